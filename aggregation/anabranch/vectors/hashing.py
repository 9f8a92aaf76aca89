"""One hash for weights: the base, an adapter, anything named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over sorted names, shapes, dtypes and bytes.

    Args:
        tensors: Named weights of any shape, dtype and device.

    Returns:
        Hexadecimal digest, equal on every machine of the same byte order.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0"
        digest.update(head.encode())
        # numpy knows no bfloat16: bytes are taken through a uint8 view.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

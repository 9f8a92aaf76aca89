"""Safetensors files: written to the same bytes every time, read with a cap on what they claim.

The library's own writer orders metadata at random, so that equal adapters would have unequal files,
and makes files nobody else can read (mode 0600).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER_BYTES = 16 << 20
"""A header holds some 150 bytes per tensor; a hostile one may claim to be as large as memory."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata.

    Raises:
        ValueError: Unreadable or broken file, header over the cap, entries that are not floating
            point. Names the file.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise ValueError(
            f"{path}: claims a header of {header_bytes} bytes in a file of {size_bytes}, at most "
            f"{MAX_HEADER_BYTES} are read; it is broken or hostile, fetch it again"
        )
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for name in sorted(file.keys()):
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); fetch it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{path}: {name} holds {tensor.dtype}; give floating-point weights, not quantised"
            )
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file and wait until it is on disk. Equal arguments give equal bytes.

    Args:
        path: A file that does not exist.
        tensors: Floating-point tensors by name.
        metadata: Strings for the header.

    Raises:
        ValueError: A tensor that is not floating point.
        OSError: The file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    # Widest entries first, as the format's own writer has them: every tensor starts aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} holds {tensor.dtype}; give floating-point weights")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            # numpy knows no bfloat16: bytes are taken through a uint8 view.
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

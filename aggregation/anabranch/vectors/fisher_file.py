"""``fisher.safetensors``: the diagonal Fisher of a contribution, beside its weights.

In a PEFT folder: for each adapted module ``M`` of the base, ``M.importance_rows`` [m] and
``M.importance_columns`` [n], whose product stands for F [m, n] of the merged weight; for a
parameter trained in full, F under the parameter's name. In a checkpoint folder: F of every tensor,
under the tensor's name and in its shape. Entries are zero or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anabranch.vectors.importance import flat_importance, from_flat_importance
from anabranch.vectors.safetensors_file import read_tensors, write_tensors
from anabranch.vectors.safetensors_header import StoredTensor, read_header
from anabranch.vectors.task_vector import Held, Stored

FISHER_FILE = "fisher.safetensors"


def write_fisher(importance: Mapping[str, Held], folder: Path) -> Path:
    """Write a Fisher into the folder that holds the weights; returns the file.

    Raises:
        ValueError: There is one already.
    """
    path = folder / FISHER_FILE
    if path.exists():
        raise ValueError(f"{path}: already exists; delete it first")
    flat = {name: one.contiguous() for name, one in flat_importance(importance).items()}
    write_tensors(path, flat, {"format": "pt"})
    return path


def read_fisher(folder: Path) -> dict[str, Held]:
    """The Fisher of a PEFT folder; empty where it holds none.

    Raises:
        ValueError: A broken file, or names that do not pair up.
    """
    path = folder / FISHER_FILE
    return _by_module(path, read_tensors(path)[0]) if path.is_file() else {}


def fisher_layout(folder: Path) -> dict[str, Held]:
    """What ``read_fisher`` would return, on torch's meta device."""
    path = folder / FISHER_FILE
    if not path.is_file():
        return {}
    stored = read_header(path)[0]
    return _by_module(path, {n: torch.empty(s.shape, device="meta") for n, s in stored.items()})


def stored_fisher(folder: Path) -> tuple[dict[str, Stored], int]:
    """The Fisher of a checkpoint folder, left on disk, and its bytes; empty where it holds none."""
    path = folder / FISHER_FILE
    tensors = read_header(path)[0] if path.is_file() else {}
    size_bytes = sum(tensor.size_bytes for tensor in tensors.values())
    return {name: _stored(tensor) for name, tensor in tensors.items()}, size_bytes


def _stored(tensor: StoredTensor) -> Stored:
    def read(first: int, out_L: Tensor) -> None:
        tensor.fill(first, out_L)
        low, high = (float(end) for end in torch.aminmax(out_L)) if len(out_L) else (0.0, 0.0)
        # A comparison that NaN fails.
        if not (low >= 0 and high <= torch.finfo(torch.float32).max):
            raise ValueError(
                f"{tensor.path}: {tensor.name} holds numbers that are negative or not finite; "
                "give squared gradients"
            )

    return Stored(tensor.shape, read)


def _by_module(path: Path, flat: Mapping[str, Tensor]) -> dict[str, Held]:
    try:
        return from_flat_importance(flat)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

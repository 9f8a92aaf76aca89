"""Named tensors as one vector, and back: names in order, each tensor row by row.

Shape legend: D entries of all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def flatten(tensors: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """All entries in fp32 [D]."""
    parts = [tensors[name].detach().to("cpu", torch.float32).flatten() for name in sorted(tensors)]
    return np.asarray(torch.cat(parts).numpy())


def entries_of(layout: Mapping[str, tuple[int, ...]]) -> int:
    """D, of tensors of these shapes."""
    return sum(math.prod(shape) for shape in layout.values())


def unflatten(
    vector_D: NDArray[np.floating], layout: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of a vector, in fp32.

    Args:
        vector_D: Their entries [D].
        layout: Shapes by name.

    Raises:
        ValueError: The vector is of another length.
    """
    if len(vector_D) != entries_of(layout):
        raise ValueError(f"{len(vector_D)} entries do not fit {entries_of(layout)}")
    found, start = {}, 0
    whole_D = torch.from_numpy(vector_D.astype(np.float32))
    for name in sorted(layout):
        end = start + math.prod(layout[name])
        found[name] = whole_D[start:end].reshape(layout[name]).clone()
        start = end
    return found

"""Changes whose numbers cannot be merged: not floating-point, or not finite in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.vectors.task_vector import Delta, LowRank, Streamed


def check_floating(delta: Delta, of: str) -> None:
    """Refuse integers and the like.

    Raises:
        ValueError: It holds others; begins with ``of``, which names contribution and module.
    """
    for tensor in _parts(delta):
        if not tensor.is_floating_point():
            raise ValueError(f"{of} holds {tensor.dtype}; give floating-point numbers")


def check_finite(delta: Delta, of: str) -> None:
    """Refuse numbers of which one would spread over the whole result.

    Raises:
        ValueError: There are some; begins with ``of``, which names contribution and module.
    """
    size = 1.0
    for tensor in _parts(delta):
        size *= largest(tensor)
    if isinstance(delta, LowRank):
        size *= delta.rank
    # A comparison that NaN fails. A product of factors is bounded before it is formed in fp32.
    if not size <= torch.finfo(torch.float32).max:
        raise ValueError(f"{of} holds numbers that are not finite in fp32; drop that contribution")


def largest(tensor: Tensor) -> float:
    """Largest magnitude, NaN where an entry is; in one pass without a temporary."""
    if not tensor.numel():
        return 1.0
    low, high = (abs(float(end)) for end in torch.aminmax(tensor.detach()))
    # Both are NaN where an entry is.
    return max(low, high)


def _parts(delta: Delta) -> tuple[Tensor, ...]:
    """The numbers of a change that are to be looked at.

    What is stored is looked at whenever it is read: a pass over files for this alone may double
    the time. What is sparse was looked at when it was made.
    """
    if isinstance(delta, Streamed):
        return ()
    return (delta.b_mk, delta.a_kn) if isinstance(delta, LowRank) else (delta,)

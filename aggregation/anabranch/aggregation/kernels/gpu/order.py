"""Median and trimmed mean: a sorting network over the contributions, in registers.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.gpu.blocks import addresses, aligned, entries_at, launch, places
from anabranch.aggregation.kernels.order import network
from anabranch.aggregation.methods.median import median as median_by_torch
from anabranch.aggregation.methods.trimmed_mean import trimmed_mean as trimmed_mean_by_torch

MOST = 64
"""Contributions whose entries fit the registers of a thread; more are sorted by torch."""

_BLOCK = 128
"""Entries of one program: one in each thread."""

_SLICE = 1 << 20
"""Entries that torch sorts at once."""


def median(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.median.median``."""
    count = len(chunk.rows)
    if count > MOST:
        return _sliced(chunk, lambda deltas_CL: median_by_torch(deltas_CL))
    return _merge(chunk, (count - 1) // 2, count // 2 + 1, True)


def trimmed_mean(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.trimmed_mean.trimmed_mean``."""
    count = len(chunk.rows)
    trim = config.dropped(count)
    if count > MOST:
        return _sliced(chunk, lambda deltas_CL: trimmed_mean_by_torch(deltas_CL, None, config))
    return _merge(chunk, trim, count - trim, False)


def _sliced(chunk: Chunk, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """A merge by torch, some of the entries at a time."""
    slices = zip(*(row_D.split(_SLICE) for row_D in chunk.rows), strict=True)
    return torch.cat([merge(torch.stack(slice_CL)) for slice_CL in slices])


def _merge(chunk: Chunk, low: int, high: int, halves: bool) -> Tensor:
    rows = chunk.rows
    merged_D = torch.empty(len(rows[0]), device=rows[0].device)
    launch(
        _middle,
        (triton.cdiv(len(merged_D), _BLOCK),),
        addresses(rows),
        merged_D,
        len(merged_D),
        1 / (high - low),
        COUNT=len(rows),
        PAIRS=tuple(network(len(rows)).flatten().tolist()),
        LOW=low,
        HIGH=high,
        HALVES=halves,
        ALIGNED=aligned(rows),
        BLOCK=_BLOCK,
    )
    return merged_D


@triton.jit
def _middle(
    addresses: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    share: tl.tensor,
    COUNT: tl.constexpr,
    PAIRS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HALVES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Mean of the sorted values from ``LOW`` to ``HIGH``.

    ``HALVES``: they are one or two, and divided before they are added.
    """
    place_B = places(BLOCK)
    values: tl.tensor = ()
    for c in tl.static_range(COUNT):
        # Triton's language has no starred tuples.
        values = values + (entries_at(addresses, c, place_B, entries, ALIGNED),)  # noqa: RUF005
    for pair in tl.static_range(len(PAIRS) // 2):
        values = _exchanged(values, PAIRS[2 * pair], PAIRS[2 * pair + 1])
    share_B = share + tl.zeros((BLOCK,), tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(LOW, HIGH):
        if HALVES:
            sum_B += values[c] * share_B
        else:
            sum_B = tl.fma(values[c], share_B, sum_B)
    tl.store(out + place_B, sum_B, mask=place_B < entries)


@triton.jit
def _exchanged(values: tl.tensor, ONE: tl.constexpr, OTHER: tl.constexpr) -> tl.tensor:
    """The smaller of two values in the place of the first, the larger in that of the second."""
    less_B = tl.minimum(values[ONE], values[OTHER])
    more_B = tl.maximum(values[ONE], values[OTHER])
    low = values[:ONE] + (less_B,)  # noqa: RUF005
    return low + values[ONE + 1 : OTHER] + (more_B,) + values[OTHER + 1 :]

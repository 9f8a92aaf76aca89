"""TIES and Breadcrumbs: magnitudes between two bounds, then an election or a sum.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.gpu.blocks import (
    added,
    entries_at,
    fp32,
    merge_rows,
    merged,
    no_sums,
    places,
)


def ties(chunk: Chunk, weights_C: Tensor, config: Any, *, thresholds_C: Tensor) -> Tensor:
    """``methods.ties.ties``."""
    return _merge(chunk, weights_C, thresholds_C, torch.full_like(weights_C, math.inf), True)


def breadcrumbs(
    chunk: Chunk, weights_C: Tensor, config: Any, *, high_C: Tensor, low_C: Tensor
) -> Tensor:
    """``methods.breadcrumbs.breadcrumbs``."""
    return _merge(chunk, weights_C / weights_C.sum(), low_C, high_C, False)


def breadcrumbs_ties(
    chunk: Chunk, weights_C: Tensor, config: Any, *, high_C: Tensor, low_C: Tensor
) -> Tensor:
    """``methods.breadcrumbs_ties.breadcrumbs_ties``."""
    return _merge(chunk, weights_C, low_C, high_C, True)


def _merge(chunk: Chunk, weights_C: Tensor, low_C: Tensor, high_C: Tensor, elects: bool) -> Tensor:
    rows = chunk.rows
    bounds = [fp32(numbers_C, rows) for numbers_C in (weights_C, low_C, high_C)]
    return merge_rows(rows, _band, *bounds, ELECTS=elects)


@triton.jit
def _band(
    addresses: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    count: tl.tensor,
    weights: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    ELECTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place_B = places(BLOCK)
    sums = no_sums(BLOCK)
    for c in tl.range(0, count, loop_unroll_factor=4):
        delta_B = entries_at(addresses, c, place_B, entries, ALIGNED)
        magnitude_B = tl.abs(delta_B)
        inside_B = (magnitude_B >= tl.load(low + c)) & (magnitude_B <= tl.load(high + c))
        kept_B = tl.where(inside_B, delta_B, 0.0)
        sums = added(kept_B, tl.load(weights + c), sums, ELECTS)
    tl.store(out + place_B, merged(sums, ELECTS), mask=place_B < entries)

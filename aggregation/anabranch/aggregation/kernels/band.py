"""TIES and Breadcrumbs: magnitudes between two bounds, then an election or a sum.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.compiled import Fp32, Int64, compiled, entries_at, fuse
from anabranch.aggregation.kernels.rows import fp32, merge_rows


def ties(chunk: Chunk, weights_C: Tensor, config: Any, *, thresholds_C: Tensor) -> Tensor:
    """``methods.ties.ties``."""
    none_C = fp32([math.inf] * len(weights_C))
    return merge_rows(chunk.rows, _band, fp32(weights_C), fp32(thresholds_C), none_C, True)


def breadcrumbs(
    chunk: Chunk, weights_C: Tensor, config: Any, *, high_C: Tensor, low_C: Tensor
) -> Tensor:
    """``methods.breadcrumbs.breadcrumbs``."""
    shares_C = fp32(weights_C / weights_C.sum())
    return merge_rows(chunk.rows, _band, shares_C, fp32(low_C), fp32(high_C), False)


def breadcrumbs_ties(
    chunk: Chunk, weights_C: Tensor, config: Any, *, high_C: Tensor, low_C: Tensor
) -> Tensor:
    """``methods.breadcrumbs_ties.breadcrumbs_ties``."""
    return merge_rows(chunk.rows, _band, fp32(weights_C), fp32(low_C), fp32(high_C), True)


@compiled
def _band(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    block: int,
    weights_C: Fp32,
    low_C: Fp32,
    high_C: Fp32,
    elects: bool,
) -> None:
    count = len(addresses_C)
    kept_CB = np.empty((count, block), np.float32)
    sign_B, share_B = np.empty(block, np.float32), np.empty(block, np.float32)
    for start in range(first, stop, block):
        size = min(block, stop - start)
        for c in range(count):
            low, high, kept_B = low_C[c], high_C[c], kept_CB[c]
            delta_B = entries_at(addresses_C[c], start, size)
            for i in range(size):
                magnitude = abs(delta_B[i])
                inside = (magnitude >= low) & (magnitude <= high)
                kept_B[i] = delta_B[i] if inside else np.float32(0)
        out_B = entries_at(out_address, start, size)
        fuse(elects, kept_CB, weights_C, sign_B, share_B, out_B)

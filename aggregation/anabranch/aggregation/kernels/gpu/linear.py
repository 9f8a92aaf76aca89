"""Σ c_i τ_i of dense entries.

Shape legend: C contributions, D entries, B entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.chunk import Rows
from anabranch.aggregation.kernels.gpu.blocks import (
    added,
    entries_at,
    fp32,
    merge_rows,
    merged,
    no_sums,
    places,
)


def weighted_sum(rows: Rows, coefficients_C: Tensor | Sequence[float]) -> Tensor:
    """``method.combine``."""
    return merge_rows(rows, _weighted_sum, fp32(coefficients_C, rows))


@triton.jit
def _weighted_sum(
    addresses: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    count: tl.tensor,
    coefficients: tl.tensor,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place_B = places(BLOCK)
    sums = no_sums(BLOCK)
    for c in tl.range(0, count, loop_unroll_factor=4):
        delta_B = entries_at(addresses, c, place_B, entries, ALIGNED)
        sums = added(delta_B, tl.load(coefficients + c), sums, False)
    tl.store(out + place_B, merged(sums, False), mask=place_B < entries)

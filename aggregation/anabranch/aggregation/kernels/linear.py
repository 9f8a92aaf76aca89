"""Σ c_i τ_i of dense entries.

Shape legend: C contributions, D entries, B entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from anabranch.aggregation.chunk import Rows
from anabranch.aggregation.kernels.compiled import Fp32, Int64, compiled, entries_at, fma
from anabranch.aggregation.kernels.rows import fp32, merge_rows


def weighted_sum(rows: Rows, coefficients_C: Tensor | Sequence[float]) -> Tensor:
    """``method.combine``."""
    return merge_rows(rows, _weighted_sum, fp32(coefficients_C))


@compiled
def _weighted_sum(
    addresses_C: Int64, out_address: int, first: int, stop: int, block: int, coefficients_C: Fp32
) -> None:
    for start in range(first, stop, block):
        size = min(block, stop - start)
        sum_B = entries_at(out_address, start, size)
        for i in range(size):
            sum_B[i] = 0
        for c in range(len(addresses_C)):
            coefficient = coefficients_C[c]
            if coefficient != 0:
                delta_B = entries_at(addresses_C[c], start, size)
                for i in range(size):
                    sum_B[i] = fma(delta_B[i], coefficient, sum_B[i])

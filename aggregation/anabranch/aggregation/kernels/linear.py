"""Σ c_i τ_i of dense entries, one of them or many.

Shape legend: C contributions, K mixtures of them, D entries, B entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.chunk import Rows
from anabranch.aggregation.kernels.compiled import Fp32, Int64, compiled, entries_at, fma
from anabranch.aggregation.kernels.rows import addresses, fp32, in_parallel, merge_rows


def weighted_sum(rows: Rows, coefficients_C: Tensor | Sequence[float]) -> Tensor:
    """``method.combine``."""
    return merge_rows(rows, _weighted_sum, fp32(coefficients_C))


def mixtures(rows: Rows, mix_KC: Tensor) -> Tensor:
    """``method.combine`` for each row of coefficients [K, D], in one pass over the entries.

    A product of matrices would round by its shape, and so by the budget.
    """
    mixed_KD = torch.empty(len(mix_KC), len(rows[0]))
    addresses_C, coefficients_KC = addresses(rows), mix_KC.numpy().astype(np.float32)
    # What is read for one mixture is there for the next in a small L2 cache.
    block = max(256, min(4096, (1 << 16) // len(rows) // 64 * 64))

    def part(first: int, stop: int) -> None:
        _mixtures(
            addresses_C, mixed_KD.data_ptr(), len(rows[0]), first, stop, block, coefficients_KC
        )

    in_parallel(part, len(rows[0]), block)
    return mixed_KD


@compiled
def _mixtures(
    addresses_C: Int64,
    out_address: int,
    entries: int,
    first: int,
    stop: int,
    block: int,
    coefficients_KC: NDArray[np.float32],
) -> None:
    for start in range(first, stop, block):
        size = min(block, stop - start)
        for k in range(len(coefficients_KC)):
            sum_B = entries_at(out_address, k * entries + start, size)
            for i in range(size):
                sum_B[i] = 0
            for c in range(len(addresses_C)):
                coefficient = coefficients_KC[k, c]
                if coefficient != 0:
                    delta_B = entries_at(addresses_C[c], start, size)
                    for i in range(size):
                        sum_B[i] = fma(delta_B[i], coefficient, sum_B[i])


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

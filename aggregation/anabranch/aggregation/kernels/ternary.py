"""Sparse ternary task vectors merged as they are, at a cost that follows their non-zeros.

Added up block by block, their positions walked in step. What comes out is, bit for bit, what the
functions on dense entries make of them.

Shape legend: C contributions, n entries, k kept of one, B entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numba import carray
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.kernels.compiled import (
    Fp32,
    Int64,
    compiled,
    entries_at,
    fma,
    pointer,
)
from anabranch.aggregation.kernels.rows import fp32, in_parallel
from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.methods.sign_vote import step
from anabranch.vectors.sparse import SparseTernary

_BLOCK = 2048
"""Entries whose five sums stay in L1 while all contributions add to them."""


def weighted_sum(
    updates: Sequence[SparseTernary], coefficients: Sequence[float], device: torch.device
) -> Tensor:
    """Σ c_i τ_i [n], in fp32, added in the order of the contributions; ``device`` is the CPU."""
    return _merged(updates, coefficients, elects=False)


def ties(
    updates: Sequence[SparseTernary],
    weights_C: Tensor,
    config: MethodConfig,
    device: torch.device,
) -> Tensor:
    """TIES per tensor [n]. It keeps all of an update, at any density.

    What is not zero is of one magnitude, so where it is more than the share to keep, all of it ties
    with the last entry kept; and a zero that is kept never counts.

    Args:
        updates: τ_i, one per contribution.
        weights_C: Weight per contribution [C], zero or more.
        config: Not read.
        device: Where to merge: the CPU.
    """
    return _merged(updates, weights_C, elects=True)


def sign_vote(
    updates: Sequence[SparseTernary],
    weights_C: Tensor,
    config: MethodConfig,
    device: torch.device,
) -> Tensor:
    """``methods.sign_vote`` per tensor [n]; arguments as in ``ties``."""
    votes = [replace(update, scale=1.0) if update.nonzeros else update for update in updates]
    counts_C = torch.tensor([update.nonzeros for update in updates], dtype=torch.float64)
    sums_C = counts_C * torch.tensor([update.scale for update in updates], dtype=torch.float64)
    total_n = _merged(votes, weights_C, elects=False)
    return total_n.sign_().mul_(step(sums_C, counts_C, weights_C))


def _merged(
    updates: Sequence[SparseTernary], weights_C: Tensor | Sequence[float], elects: bool
) -> Tensor:
    merged_n = torch.empty(updates[0].entries)
    positions = [update.positions_k.contiguous() for update in updates]
    negatives = [update.negative_k.contiguous() for update in updates]
    positions_C = np.array([tensor.data_ptr() for tensor in positions], np.int64)
    negatives_C = np.array([tensor.data_ptr() for tensor in negatives], np.int64)
    counts_C = np.array([len(tensor) for tensor in positions], np.int64)
    values, weights = fp32([update.scale for update in updates]), fp32(weights_C)

    def part(first: int, stop: int) -> None:
        out = merged_n.data_ptr()
        _merge(positions_C, negatives_C, counts_C, values, weights, elects, out, first, stop)

    in_parallel(part, len(merged_n), _BLOCK)
    return merged_n


@compiled
def _place_of(position_k: Int64, first: int) -> int:
    """How many positions lie before ``first``."""
    low, high = 0, len(position_k)
    while low < high:
        middle = (low + high) // 2
        if position_k[middle] < first:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _merge(
    positions_C: Int64,
    negatives_C: Int64,
    counts_C: Int64,
    values_C: Fp32,
    weights_C: Fp32,
    elects: bool,
    out_address: int,
    first: int,
    stop: int,
) -> None:
    count = len(positions_C)
    places_C = np.empty(count, np.int64)
    for c in range(count):
        position_k = carray(pointer(positions_C[c]), (counts_C[c],), np.int64)
        places_C[c] = _place_of(position_k, first)
    # By sign: what its entries sum to, and what those who say so weigh.
    sums_B4 = np.empty((_BLOCK, 4), np.float32)
    for start in range(first, stop, _BLOCK):
        end = min(stop, start + _BLOCK)
        total_B = entries_at(out_address, start, end - start)
        total_B[:] = 0
        sums_B4[:] = 0
        for c in range(count):
            position_k = carray(pointer(positions_C[c]), (counts_C[c],), np.int64)
            negative_k = carray(pointer(negatives_C[c]), (counts_C[c],), np.uint8)
            place, value, weight = places_C[c], values_C[c], weights_C[c]
            while place < counts_C[c] and position_k[place] < end:
                entry, negative = position_k[place] - start, np.int64(negative_k[place])
                total_B[entry] = fma(-value if negative else value, weight, total_B[entry])
                if elects:
                    sums_B4[entry, negative] = fma(value, weight, sums_B4[entry, negative])
                    sums_B4[entry, 2 + negative] += weight
                place += 1
            places_C[c] = place
        if elects:
            _elect(total_B, sums_B4)


@compiled
def _elect(total_B: Fp32, sums_B4: NDArray[np.float32]) -> None:
    """From the weighted sums to the mean of those whose sign won, 0 where nobody says anything."""
    for i in range(len(total_B)):
        negative = 0 if total_B[i] >= 0 else 1
        share = sums_B4[i, 2 + negative]
        mean = sums_B4[i, negative] / (np.float32(1) if share == 0 else share)
        total_B[i] = -mean if negative else mean

"""SCE: the variance over the contributions, taken again wherever it is needed and never stored.

Shape legend: C contributions, D entries of a chunk, B entries of a block, P blocks of rows,
L sums side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.chunk import ROW_BLOCK, Chunk
from anabranch.aggregation.kernels.compiled import (
    Fp32,
    Int64,
    compiled,
    elect_and_average,
    entries_at,
    fma,
)
from anabranch.aggregation.kernels.rows import addresses, fp32, in_parallel, merge_rows
from anabranch.aggregation.statistics import Found

_BLOCK = 1024

_LANES = 64
"""Sums that run side by side: one alone would wait for every addition before the next."""


def variance(chunk: Chunk, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    """``methods.sce.variance`` [1, D]."""
    return merge_rows(chunk.rows, _variances, np.float32(1 / len(chunk.rows)))[None]


def varying(chunk: Chunk, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    """How many entries of a chunk vary [1, 1], fp64."""
    addresses_C, inverse = addresses(chunk.rows), np.float32(1 / len(chunk.rows))
    counts: list[int] = []

    def part(first: int, stop: int) -> None:
        counts.append(_varying(addresses_C, first, stop, inverse))

    in_parallel(part, len(chunk.rows[0]), _BLOCK)
    return torch.tensor([[sum(counts)]], dtype=torch.float64)


def energies(chunk: Chunk, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    """Σ τ² over the selected entries, by blocks of rows, which no chunk cuts [C, P], fp64."""
    piece = ROW_BLOCK * chunk.columns
    entries = len(chunk.rows[0])
    sums_CP = torch.zeros(len(chunk.rows), -(-entries // piece), dtype=torch.float64)
    addresses_C, inverse = addresses(chunk.rows), np.float32(1 / len(chunk.rows))
    threshold = np.float32(found["threshold_1"].item())

    def part(first: int, stop: int) -> None:
        _energies(addresses_C, entries, piece, first, stop, inverse, threshold, sums_CP.numpy())

    in_parallel(part, sums_CP.shape[1])
    return sums_CP


def sce(
    chunk: Chunk,
    weights_C: Tensor,
    config: Any,
    *,
    varying_1: Tensor,
    threshold_1: Tensor,
    energies_C: Tensor,
) -> Tensor:
    """``methods.sce.sce``."""
    count = len(chunk.rows)
    shares_C = energies_C / energies_C.sum() if energies_C.any() else torch.ones(count)
    return merge_rows(
        chunk.rows,
        _sce,
        fp32(shares_C),
        np.float32(threshold_1.item()),
        config.unselected == "zero",
        np.float32(1 / count),
    )


@compiled
def _variance_of(
    addresses_C: Int64, start: int, inverse: np.float32, mean_B: Fp32, variance_B: Fp32
) -> None:
    """Variance of the entries from ``start`` on, as ``methods.sce.variance`` takes it."""
    size = len(variance_B)
    first_B = entries_at(addresses_C[0], start, size)
    for i in range(size):
        mean_B[i] = 0
        variance_B[i] = 0
    for c in range(1, len(addresses_C)):
        delta_B = entries_at(addresses_C[c], start, size)
        for i in range(size):
            mean_B[i] = fma(delta_B[i] - first_B[i], inverse, mean_B[i])
    for c in range(len(addresses_C)):
        delta_B = entries_at(addresses_C[c], start, size)
        for i in range(size):
            off = (delta_B[i] - first_B[i]) - mean_B[i]
            variance_B[i] = fma(off * off, inverse, variance_B[i])


@compiled
def _variances(
    addresses_C: Int64, out_address: int, first: int, stop: int, block: int, inverse: np.float32
) -> None:
    mean_B = np.empty(block, np.float32)
    for start in range(first, stop, block):
        variance_B = entries_at(out_address, start, min(block, stop - start))
        _variance_of(addresses_C, start, inverse, mean_B, variance_B)


@compiled
def _varying(addresses_C: Int64, first: int, stop: int, inverse: np.float32) -> int:
    mean_B, variance_B = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    found = 0
    for start in range(first, stop, _BLOCK):
        size = min(_BLOCK, stop - start)
        _variance_of(addresses_C, start, inverse, mean_B, variance_B[:size])
        for i in range(size):
            found += variance_B[i] > 0
    return found


@compiled
def _energies(
    addresses_C: Int64,
    entries: int,
    piece: int,
    first: int,
    stop: int,
    inverse: np.float32,
    threshold: np.float32,
    sums_CP: NDArray[np.float64],
) -> None:
    mean_B, variance_B = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    lane_L = np.empty(_LANES)
    for place in range(first, stop):
        end = min(entries, (place + 1) * piece)
        for start in range(place * piece, end, _BLOCK):
            size = min(_BLOCK, end - start)
            _variance_of(addresses_C, start, inverse, mean_B, variance_B[:size])
            for c in range(len(addresses_C)):
                delta_B = entries_at(addresses_C[c], start, size)
                sums_CP[c, place] += _selected_square(delta_B, variance_B, threshold, lane_L)


@compiled
def _selected_square(
    delta_B: Fp32, variance_B: Fp32, threshold: np.float32, lane_L: NDArray[np.float64]
) -> float:
    """Σ τ² of the selected entries of a block, in fp64; ``lane_L`` is written over."""
    lane_L[:] = 0
    whole = len(delta_B) // _LANES * _LANES
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            delta = np.float64(delta_B[start + lane])
            selected = variance_B[start + lane] >= threshold
            lane_L[lane] += delta * delta if selected else 0.0
    for i in range(whole, len(delta_B)):
        delta = np.float64(delta_B[i])
        lane_L[i - whole] += delta * delta if variance_B[i] >= threshold else 0.0
    total = 0.0
    for lane in range(_LANES):
        total += lane_L[lane]
    return total


@compiled
def _sce(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    block: int,
    shares_C: Fp32,
    threshold: np.float32,
    zeroes: bool,
    inverse: np.float32,
) -> None:
    count = len(addresses_C)
    kept_CB = np.empty((count, block), np.float32)
    votes_C = np.ones(count, np.float32)
    sign_B, share_B = np.empty(block, np.float32), np.empty(block, np.float32)
    for start in range(first, stop, block):
        size = min(block, stop - start)
        # Not yet in use: the mean goes where the signs will be, the variance where the shares will.
        _variance_of(addresses_C, start, inverse, sign_B, share_B[:size])
        least = threshold if zeroes else np.float32(-1)
        for c in range(count):
            kept_B, delta_B = kept_CB[c], entries_at(addresses_C[c], start, size)
            for i in range(size):
                kept_B[i] = delta_B[i] if share_B[i] >= least else np.float32(0)
        out_B = entries_at(out_address, start, size)
        elect_and_average(kept_CB, votes_C, shares_C, sign_B, share_B, out_B)

"""Median, trimmed mean and mean around the median: a sorting network, many entries side by side.

Shape legend: C contributions, D entries of a chunk, B entries of a block, P pairs to compare.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from anabranch.aggregation.chunk import Chunk, Rows
from anabranch.aggregation.kernels.compiled import Fp32, Int64, compiled, entries_at, exchange, fma
from anabranch.aggregation.kernels.rows import merge_rows
from anabranch.aggregation.methods.bulyan import selected
from anabranch.aggregation.robust.arc import check_minority

_BLOCK_ENTRIES = 1 << 13
"""Entries of all contributions at once: every comparison reads and writes two rows, out of L1."""


def median(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.median.median``."""
    count = len(chunk.rows)
    return _merge(chunk, (count - 1) // 2, count // 2 + 1, True)


def trimmed_mean(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.trimmed_mean.trimmed_mean``."""
    trim = config.dropped(len(chunk.rows))
    return _merge(chunk, trim, len(chunk.rows) - trim, False)


def meamed(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.meamed.meamed``."""
    check_minority("meamed", config.f, len(chunk.rows))
    return _around(chunk.rows, config.f)


def bulyan(chunk: Chunk, weights_C: Tensor, config: Any, *, gram_CC: Tensor) -> Tensor:
    """``methods.bulyan.bulyan``."""
    best = selected(gram_CC, config).tolist()
    return _around([chunk.rows[place] for place in best], 2 * config.f)


def _around(rows: Rows, f: int) -> Tensor:
    return merge_rows(rows, _near_middle, network(len(rows)), f, block=_block(len(rows)))


def _merge(chunk: Chunk, low: int, high: int, halves: bool) -> Tensor:
    count = len(chunk.rows)
    pairs_P2 = network(count)
    return merge_rows(chunk.rows, _middle, pairs_P2, low, high, halves, block=_block(count))


def _block(count: int) -> int:
    return max(64, _BLOCK_ENTRIES // count // 64 * 64)


@lru_cache(maxsize=32)
def network(count: int) -> Int64:
    """Pairs whose comparison, one after the other, sorts ``count`` numbers [P, 2].

    Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2M): 63 for 16.
    """
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return np.array(pairs, np.int64).reshape(-1, 2)


@compiled
def _sort(addresses_C: Int64, start: int, size: int, pairs_P2: Int64, values_CB: Fp32) -> None:
    """The entries of a block, each entry's from the smallest to the largest."""
    for c in range(len(addresses_C)):
        value_B, delta_B = values_CB[c], entries_at(addresses_C[c], start, size)
        for i in range(size):
            value_B[i] = delta_B[i]
    # Beyond the entries lies what was there before: it is exchanged, too, and not read.
    whole = (size + 7) // 8 * 8
    first, line = values_CB.ctypes.data, values_CB.shape[1] * 4
    for pair in range(len(pairs_P2)):
        exchange(first + pairs_P2[pair, 0] * line, first + pairs_P2[pair, 1] * line, whole)


@compiled
def _middle(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    block: int,
    pairs_P2: Int64,
    low: int,
    high: int,
    halves: bool,
) -> None:
    """Mean of the sorted values from ``low`` to ``high``.

    ``halves``: they are one or two, and divided before they are added.
    """
    count = len(addresses_C)
    values_CB = np.zeros((count, block), np.float32)
    share = np.float32(1.0 / (high - low))
    for start in range(first, stop, block):
        size = min(block, stop - start)
        _sort(addresses_C, start, size, pairs_P2, values_CB)
        out_B = entries_at(out_address, start, size)
        for i in range(size):
            out_B[i] = 0
        for c in range(low, high):
            value_B = values_CB[c]
            if halves:
                for i in range(size):
                    out_B[i] += value_B[i] * share
            else:
                for i in range(size):
                    out_B[i] = fma(value_B[i], share, out_B[i])


@compiled
def _near_middle(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    block: int,
    pairs_P2: Int64,
    f: int,
) -> None:
    """``methods.meamed.mean_around_median``."""
    count = len(addresses_C)
    left = count - f
    half, reach = np.float32(2), np.float32(left)
    values_CB = np.zeros((count, block), np.float32)
    middle_B, total_B = np.empty(block, np.float32), np.empty(block, np.float64)
    first_B, one, none = np.empty(block, np.float32), np.float32(1), np.float32(0)
    for start in range(first, stop, block):
        size = min(block, stop - start)
        _sort(addresses_C, start, size, pairs_P2, values_CB)
        low_B, high_B = values_CB[(count - 1) // 2], values_CB[count // 2]
        for i in range(size):
            middle_B[i] = low_B[i] / half + high_B[i] / half
            first_B[i] = none
            total_B[i] = 0
        for c in range(f):
            low_B, high_B = values_CB[c], values_CB[c + left]
            for i in range(size):
                first_B[i] += one if middle_B[i] - low_B[i] > high_B[i] - middle_B[i] else none
        for c in range(count):
            value_B, here = values_CB[c], np.float32(c)
            for i in range(size):
                inside = (first_B[i] <= here) & (here - reach < first_B[i])
                total_B[i] += value_B[i] if inside else none
        out_B = entries_at(out_address, start, size)
        for i in range(size):
            out_B[i] = total_B[i] / left

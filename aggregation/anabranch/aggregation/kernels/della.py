"""DELLA: rows ranked by a radix sort, drawn by counter, then an election or a sum.

Shape legend: C contributions, D entries of a chunk, c columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.compiled import (
    Fp32,
    Int64,
    bits_at,
    compiled,
    entries_at,
    fuse,
)
from anabranch.aggregation.kernels.counter import drawn, keys
from anabranch.aggregation.kernels.rows import fp32, merge_rows

UInt64 = NDArray[np.uint64]

_DIGITS = 256


def della_linear(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.della_linear.della_linear`` with the draw of ``survivor_factors``."""
    return _merge(chunk, weights_C / weights_C.sum(), config, False)


def della(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.della.della`` with the draw of ``survivor_factors``."""
    return _merge(chunk, weights_C, config, True)


def _merge(chunk: Chunk, weights_C: Tensor, config: Any, elects: bool) -> Tensor:
    columns = chunk.columns
    lowest, step = config.density - config.epsilon, config.epsilon / max(1, columns - 1)
    if columns == 1:
        lowest = config.density
    return merge_rows(
        chunk.rows,
        _della,
        fp32(weights_C),
        keys(chunk, config.seed),
        np.uint64(chunk.start * columns),
        np.float32(lowest),
        np.float32(step),
        elects,
        block=columns,
    )


@compiled
def _della(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    columns: int,
    weights_C: Fp32,
    keys_C: UInt64,
    position: np.uint64,
    lowest: np.float32,
    step: np.float32,
    elects: bool,
) -> None:
    count = len(addresses_C)
    kept_Cc = np.empty((count, columns), np.float32)
    sign_c, share_c = np.empty(columns, np.float32), np.empty(columns, np.float32)
    ordered_c, other_c = np.empty(columns, np.uint64), np.empty(columns, np.uint64)
    digits = np.empty((4, _DIGITS), np.int64)
    for start in range(first, stop, columns):
        place = position + np.uint64(start)
        for c in range(count):
            key, kept_c = keys_C[c], kept_Cc[c]
            delta_c = entries_at(addresses_C[c], start, columns)
            ordered_c, other_c = _sort(
                bits_at(addresses_C[c], start, columns), ordered_c, other_c, digits
            )
            low = 0
            while low < columns:
                magnitude = ordered_c[low] >> np.uint64(32)
                high = low + 1
                while high < columns and ordered_c[high] >> np.uint64(32) == magnitude:
                    high += 1
                # Equal magnitudes share the mean of their ranks r: first + last place is 2(r − 1).
                keep = np.float32(low + high - 1) * step + lowest
                for i in range(low, high):
                    column = np.int64(ordered_c[i] & np.uint64(0xFFFFFFFF))
                    uniform = np.float64(drawn(key, place + np.uint64(column))) * 2.0**-53
                    survives = uniform < np.float64(keep)
                    factor = np.float32(1) / keep if survives else np.float32(0)
                    kept_c[column] = delta_c[column] * factor
                low = high
        fuse(elects, kept_Cc, weights_C, sign_c, share_c, entries_at(out_address, start, columns))


@compiled
def _sort(
    bits_c: NDArray[np.int32], one_c: UInt64, other_c: UInt64, digits: Int64
) -> tuple[UInt64, UInt64]:
    """Magnitude bits above, column below, in ascending order, and the memory that is left over.

    Least digit first, a byte at a time; bytes that all entries share cost no pass.
    """
    columns = len(bits_c)
    digits[:] = 0
    for i in range(columns):
        magnitude = np.uint64(bits_c[i] & np.int32(0x7FFFFFFF))
        one_c[i] = (magnitude << np.uint64(32)) | np.uint64(i)
        for digit in range(4):
            digits[digit, (magnitude >> np.uint64(8 * digit)) & np.uint64(255)] += 1
    for digit in range(4):
        shift = np.uint64(32 + 8 * digit)
        places = digits[digit]
        if places[(one_c[0] >> shift) & np.uint64(255)] == columns:
            continue
        total = 0
        for value in range(_DIGITS):
            places[value], total = total, total + places[value]
        for i in range(columns):
            value = (one_c[i] >> shift) & np.uint64(255)
            other_c[places[value]] = one_c[i]
            places[value] += 1
        one_c, other_c = other_c, one_c
    return one_c, other_c

"""Histograms of the halves of fp32 numbers, from which ``magnitude`` finds the exact k-th.

Shape legend: K rows, D entries of a row, H buckets.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anabranch.aggregation.chunk import Rows
from anabranch.aggregation.kernels.compiled import Int64, bits_at, compiled
from anabranch.aggregation.kernels.rows import addresses, in_parallel

_BUCKETS = 1 << 16

_SEGMENT = 1 << 22
"""Entries counted at once: fewer would spend their time on adding up 64 Ki counters."""


def histogram(
    rows: Rows, bucket_K: Tensor | None, magnitude: bool, total_KH: Tensor | None
) -> Tensor:
    """``magnitude._histogram`` of one chunk [K, H], added to ``total_KH`` if there is one."""
    addresses_K, entries = addresses(rows), len(rows[0])
    if total_KH is None:
        total_KH = torch.zeros(len(rows), _BUCKETS, dtype=torch.int64)
    segments = max(1, -(-entries // _SEGMENT))
    # A row that is counted in one go is counted where the total is.
    shape = (len(rows), segments, _BUCKETS)
    counts_KSH = np.zeros(shape, np.int64) if segments > 1 else total_KH[:, None].numpy()
    buckets = [-1] * len(rows) if bucket_K is None else bucket_K.tolist()

    def part(first: int, stop: int) -> None:
        for place in range(first, stop):
            row, segment = divmod(place, segments)
            start, end = (entries * (segment + i) // segments for i in (0, 1))
            counts_H = counts_KSH[row, segment]
            if buckets[row] < 0:
                _upper(addresses_K[row], start, end - start, magnitude, counts_H)
            else:
                _lower(addresses_K[row], start, end - start, magnitude, buckets[row], counts_H)

    in_parallel(part, len(rows) * segments)
    return total_KH.add_(torch.from_numpy(counts_KSH.sum(axis=1))) if segments > 1 else total_KH


@compiled
def _signed_order(bits: np.int32) -> np.int32:
    """A number's bits so that they order like the number, from 0 up; −0 is 0."""
    bits = np.int32(0) if bits == np.int32(-0x80000000) else bits
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)) ^ np.int32(-0x80000000)


@compiled
def _upper(address: int, first: int, count: int, magnitude: bool, counts_H: Int64) -> None:
    """Count the upper halves."""
    bits_D = bits_at(address, first, count)
    if magnitude:
        for i in range(count):
            counts_H[(bits_D[i] >> np.int32(16)) & 0x7FFF] += 1
    else:
        for i in range(count):
            counts_H[(_signed_order(bits_D[i]) >> np.int32(16)) & 0xFFFF] += 1


@compiled
def _lower(
    address: int,
    first: int,
    count: int,
    magnitude: bool,
    bucket: int,
    counts_H: Int64,
) -> None:
    """Count the lower halves of those whose upper half is ``bucket``."""
    bits_D = bits_at(address, first, count)
    if magnitude:
        for i in range(count):
            if (bits_D[i] >> np.int32(16)) & 0x7FFF == bucket:
                counts_H[bits_D[i] & 0xFFFF] += 1
    else:
        for i in range(count):
            order = _signed_order(bits_D[i])
            if (order >> np.int32(16)) & 0xFFFF == bucket:
                counts_H[order & 0xFFFF] += 1

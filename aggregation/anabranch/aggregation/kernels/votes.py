"""MagMax and Consensus: contributions compared with each other, entry by entry.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.compiled import Fp32, Int64, compiled, entries_at, fma
from anabranch.aggregation.kernels.rows import fp32, merge_rows


def magmax(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.magmax.magmax``."""
    return merge_rows(chunk.rows, _magmax)


def consensus(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.consensus.consensus``."""
    config.check(len(chunk.rows))
    scale, votes = np.float32(config.mask_scale), np.float32(config.votes)
    return merge_rows(chunk.rows, _consensus, fp32(weights_C), scale, votes)


@compiled
def _magmax(addresses_C: Int64, out_address: int, first: int, stop: int, block: int) -> None:
    low_B = np.empty(block, np.float32)
    for start in range(first, stop, block):
        size = min(block, stop - start)
        high_B = entries_at(out_address, start, size)
        delta_B = entries_at(addresses_C[0], start, size)
        for i in range(size):
            high_B[i] = low_B[i] = delta_B[i]
        for c in range(1, len(addresses_C)):
            delta_B = entries_at(addresses_C[c], start, size)
            for i in range(size):
                high_B[i] = delta_B[i] if delta_B[i] > high_B[i] else high_B[i]
                low_B[i] = delta_B[i] if delta_B[i] < low_B[i] else low_B[i]
        for i in range(size):
            high_B[i] = high_B[i] if high_B[i] >= -low_B[i] else low_B[i]


@compiled
def _consensus(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    block: int,
    weights_C: Fp32,
    mask_scale: np.float32,
    votes: np.float32,
) -> None:
    total_B, votes_B = np.empty(block, np.float32), np.empty(block, np.float32)
    for start in range(first, stop, block):
        size = min(block, stop - start)
        for i in range(size):
            total_B[i] = 0
            votes_B[i] = 0
        for c in range(len(addresses_C)):
            weight, delta_B = weights_C[c], entries_at(addresses_C[c], start, size)
            for i in range(size):
                total_B[i] = fma(delta_B[i], weight, total_B[i])
        for c in range(len(addresses_C)):
            weight, delta_B = weights_C[c], entries_at(addresses_C[c], start, size)
            for i in range(size):
                part = delta_B[i] * weight
                own = abs(part) > abs(total_B[i] - part) * mask_scale
                votes_B[i] += np.float32(1) if own else np.float32(0)
        out_B = entries_at(out_address, start, size)
        for i in range(size):
            out_B[i] = total_B[i] if votes_B[i] >= votes else np.float32(0)

"""DARE: the draw by counter inside the loop, so that no mask is ever held.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.compiled import Fp32, Int64, compiled, entries_at, fuse
from anabranch.aggregation.kernels.counter import STEPS, drawn, keys
from anabranch.aggregation.kernels.rows import fp32, merge_rows


def dare_linear(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.dare_linear.dare_linear`` with the masks of ``keep_masks``."""
    return _merge(chunk, weights_C / weights_C.sum(), config, False)


def dare_ties(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.dare_ties.dare_ties`` with the masks of ``keep_masks``."""
    return _merge(chunk, weights_C, config, True)


def _merge(chunk: Chunk, weights_C: Tensor, config: Any, elects: bool) -> Tensor:
    # k·2⁻⁵³ < density exactly where k < ⌈density·2⁵³⌉, and that product is exact.
    limit = np.uint64(math.ceil(config.density * STEPS))
    return merge_rows(
        chunk.rows,
        _dare,
        fp32(weights_C),
        keys(chunk, config.seed),
        np.uint64(chunk.start * chunk.columns),
        limit,
        np.float32(config.density),
        elects,
    )


@compiled
def _dare(
    addresses_C: Int64,
    out_address: int,
    first: int,
    stop: int,
    block: int,
    weights_C: Fp32,
    keys_C: NDArray[np.uint64],
    position: np.uint64,
    limit: np.uint64,
    density: np.float32,
    elects: bool,
) -> None:
    count = len(addresses_C)
    kept_CB = np.empty((count, block), np.float32)
    sign_B, share_B = np.empty(block, np.float32), np.empty(block, np.float32)
    for start in range(first, stop, block):
        size = min(block, stop - start)
        place = position + np.uint64(start)
        for c in range(count):
            key, kept_B = keys_C[c], kept_CB[c]
            delta_B = entries_at(addresses_C[c], start, size)
            for i in range(size):
                keeps = drawn(key, place + np.uint64(i)) < limit
                kept_B[i] = delta_B[i] / density if keeps else np.float32(0)
        out_B = entries_at(out_address, start, size)
        fuse(elects, kept_CB, weights_C, sign_B, share_B, out_B)

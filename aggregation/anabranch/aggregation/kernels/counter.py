"""``vectors.counter`` inside a kernel: the same bits.

Shape legend: C contributions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.compiled import compiled
from anabranch.vectors.counter import GOLDEN, MIX_1, MIX_2, stream_key

STEPS = 1 << 53
"""Uniform numbers are whole multiples of 1 over this."""

_GOLDEN, _MIX_1, _MIX_2 = np.uint64(GOLDEN), np.uint64(MIX_1), np.uint64(MIX_2)


def keys(chunk: Chunk, seed: int) -> NDArray[np.uint64]:
    """Key of each contribution's stream for a module [C]."""
    streams = [(seed, chunk.module, contribution) for contribution in range(len(chunk.rows))]
    return np.array([stream_key(stream) for stream in streams], np.uint64)


@compiled
def drawn(key: np.uint64, place: np.uint64) -> np.uint64:
    """Number ``place`` of a stream times 2⁵³: ``counter.uniform`` before it becomes fp64."""
    x = (place + np.uint64(1)) * _GOLDEN + key
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return (x ^ (x >> np.uint64(31))) >> np.uint64(11)

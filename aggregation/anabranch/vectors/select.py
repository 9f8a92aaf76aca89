"""Exact selection of the largest magnitudes, in one pass over the entries and a bit.

A threshold guessed from a sample lets through slightly more than k candidates; the exact k-th is
then found among those few. A wrong guess costs a second pass, never a wrong answer.

The work runs in numpy on the CPU: on one thread its compare-and-gather is 2.6x faster than
torch's, and the whole is about 10x faster than ``torch.topk`` at 10M entries.

Shape legend: n entries of the tensor, c candidates, k kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[Any]
Floats = NDArray[np.float32]

_MAGNITUDE = 0x7FFF_FFFF
"""Without the sign bit, the bits of fp32 values order as their magnitudes do, NaN above all."""

_INFINITY = 0x7F80_0000

_CHUNK = 1 << 15
"""Entries scanned at a time: their bits and mask stay in the L2 cache."""

_SAMPLE = 1 << 14

_MARGIN_SIGMAS = 4.0
"""A sampled threshold is too high once in 30,000 tensors, and then the scan is repeated."""


def keep(x: Tensor, density: float) -> tuple[IntArray, Floats]:
    """A share of the entries, largest first; zeros are never kept.

    Args:
        x: Entries of any shape, floating dtype and device; read in fp32.
        density: Share kept, in (0, 1]: k = max(1, round(density·n)), or the number of non-zero
            entries where that is smaller.

    Returns:
        Positions, int64 [k], strictly ascending into the flattened tensor, and values, fp32 [k].

    Raises:
        ValueError: ``density`` is out of range, or an entry is NaN or infinite.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; give the share of entries to keep, in (0, 1]")
    if not x.numel():
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    positions_k, values_k = largest(x, max(1, round(density * x.numel())))
    kept_k = values_k != 0
    if kept_k.all():
        return positions_k, values_k
    return positions_k[kept_k], values_k[kept_k]


def largest(x: Tensor, k: int) -> tuple[IntArray, Floats]:
    """The k entries largest in magnitude; of equal entries, the first ones.

    Args:
        x: Entries of any shape, floating dtype and device; read in fp32.
        k: How many to keep.

    Returns:
        Positions, int64 [k], strictly ascending into the flattened tensor, and values, fp32 [k].

    Raises:
        ValueError: ``k`` is not in 1..n, or an entry is NaN or infinite.
    """
    entries_n = x.detach().to("cpu", torch.float32).reshape(-1)
    positions_c, bits_c = _candidates(entries_n.numpy().view(np.int32), k)
    magnitudes_c = bits_c & _MAGNITUDE
    kth = _kth(magnitudes_c, k)
    kept_c = magnitudes_c > kth
    ties = np.flatnonzero(magnitudes_c == kth)
    kept_c[ties[: k - np.count_nonzero(kept_c)]] = True
    return positions_c[kept_c], bits_c[kept_c].view(np.float32)


def _kth(magnitudes_c: IntArray, k: int) -> Any:
    index = magnitudes_c.size - k
    return np.partition(magnitudes_c, index)[index]


def _candidates(bits_n: IntArray, k: int) -> tuple[IntArray, IntArray]:
    """Positions and bits of at least the k largest entries, positions ascending."""
    if not 1 <= k <= bits_n.size:
        raise ValueError(f"k is {k}; give one between 1 and the {bits_n.size} entries there are")
    positions_c, bits_c = _at_least(bits_n, _sampled_floor(bits_n, k))
    if positions_c.size < k:
        positions_c, bits_c = _at_least(bits_n, 0)
    # NaN and infinity order above every finite value, so no floor hides one.
    if (bits_c & _MAGNITUDE).max() >= _INFINITY:
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    return positions_c, bits_c


def _sampled_floor(bits_n: IntArray, k: int) -> int:
    """Magnitude bits that very probably at least k entries reach, and few more; 0 for all."""
    if bits_n.size <= 4 * _SAMPLE:
        return 0
    share = k / bits_n.size
    rank = _SAMPLE * share + _MARGIN_SIGMAS * (_SAMPLE * share * (1 - share)) ** 0.5 + 1
    if rank >= _SAMPLE:
        return 0
    return int(_kth(bits_n[_drawn(bits_n.size)] & _MAGNITUDE, int(rank)))


@lru_cache(maxsize=16)
def _drawn(entries: int) -> IntArray:
    """Positions of a sample; tensors of one size share them, and the draw is a third of the cost.

    A fixed seed keeps the time reproducible; the result does not depend on it.
    """
    return np.random.default_rng(0).integers(entries, size=_SAMPLE)


def _at_least(bits_n: IntArray, floor: int) -> tuple[IntArray, IntArray]:
    """Positions (int64) and bits (int32) of the entries whose magnitude is not below the floor."""
    magnitudes = np.empty(_CHUNK, np.int32)
    mask = np.empty(_CHUNK, np.bool_)
    positions: list[IntArray] = []
    bits: list[IntArray] = []
    for start in range(0, bits_n.size, _CHUNK):
        chunk = bits_n[start : start + _CHUNK]
        np.bitwise_and(chunk, _MAGNITUDE, out=magnitudes[: chunk.size])
        np.greater_equal(magnitudes[: chunk.size], floor, out=mask[: chunk.size])
        found = np.flatnonzero(mask[: chunk.size])
        bits.append(chunk[found])  # while the chunk is in the cache
        found += start
        positions.append(found)
    return np.concatenate(positions), np.concatenate(bits)

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

_CHUNK = 1 << 16
"""Entries scanned at a time: their bits and mask stay in the L2 cache."""

_SAMPLE = 1 << 14

_MARGIN_SIGMAS = 4.0
"""A sampled threshold is too high once in 30,000 tensors, and then the scan is repeated."""

_SLACK = 1.25
"""Candidates per entry kept up to which what is returned keeps the memory they were found in."""


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
    index = magnitudes_c.size - k
    magnitudes_c.partition(index)
    kth = magnitudes_c[index]
    # NaN and infinity order above every finite value, so no floor hides one.
    if magnitudes_c[index:].max() >= _INFINITY:
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    ties = k - int(np.count_nonzero(magnitudes_c[index:] > kth))
    _drop(positions_c, bits_c, kth, ties)
    positions_k, bits_k = positions_c[:k], bits_c[:k]
    if bits_c.size > _SLACK * k:
        positions_k, bits_k = positions_k.copy(), bits_k.copy()
    return positions_k, bits_k.view(np.float32)


def _drop(positions_c: IntArray, bits_c: IntArray, kth: Any, ties: int) -> None:
    """Move what is kept to the front: what is above the k-th, and so many of its equals.

    In place: fresh memory would cost more than all of the work.
    """
    at = 0
    for start in range(0, bits_c.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        magnitudes = bits_c[chunk] & _MAGNITUDE
        kept = magnitudes > kth
        if ties:
            equal = np.flatnonzero(magnitudes == kth)[:ties]
            kept[equal] = True
            ties -= equal.size
        end = at + int(np.count_nonzero(kept))
        positions_c[at:end] = positions_c[chunk][kept]
        bits_c[at:end] = bits_c[chunk][kept]
        at = end


def _candidates(bits_n: IntArray, k: int) -> tuple[IntArray, IntArray]:
    """Positions and bits of at least the k largest entries, positions ascending."""
    if not 1 <= k <= bits_n.size:
        raise ValueError(f"k is {k}; give one between 1 and the {bits_n.size} entries there are")
    found = _at_least(bits_n, *_sampled(bits_n, k))
    if found is None or found[0].size < k:
        found = _at_least(bits_n, 0, bits_n.size)
    assert found is not None
    return found


def _sampled(bits_n: IntArray, k: int) -> tuple[int, int]:
    """Magnitude bits that very probably at least k entries reach, and room for those that do."""
    if bits_n.size <= 4 * _SAMPLE:
        return 0, bits_n.size
    share = k / bits_n.size
    margin = _MARGIN_SIGMAS * (_SAMPLE * share * (1 - share)) ** 0.5 + 1
    rank = _SAMPLE * share + margin
    if rank >= _SAMPLE:
        return 0, bits_n.size
    sample = bits_n[_drawn(bits_n.size)] & _MAGNITUDE
    index = _SAMPLE - int(rank)
    floor = int(np.partition(sample, index)[index])
    return floor, min(bits_n.size, int((rank + 2 * margin) / _SAMPLE * bits_n.size))


@lru_cache(maxsize=16)
def _drawn(entries: int) -> IntArray:
    """Positions of a sample; tensors of one size share them, and the draw is a third of the cost.

    A fixed seed keeps the time reproducible; the result does not depend on it.
    """
    return np.random.default_rng(0).integers(entries, size=_SAMPLE)


def _at_least(bits_n: IntArray, floor: int, room: int) -> tuple[IntArray, IntArray] | None:
    """Positions (int64) and bits (int32) of the entries whose magnitude is not below the floor.

    None where there are more than there is room for.
    """
    positions, bits = np.empty(room, np.int64), np.empty(room, np.int32)
    magnitudes = np.empty(min(_CHUNK, bits_n.size), np.int32)
    mask = np.empty(magnitudes.size, np.bool_)
    at = 0
    for start in range(0, bits_n.size, _CHUNK):
        chunk = bits_n[start : start + _CHUNK]
        np.bitwise_and(chunk, _MAGNITUDE, out=magnitudes[: chunk.size])
        np.greater_equal(magnitudes[: chunk.size], floor, out=mask[: chunk.size])
        found = np.flatnonzero(mask[: chunk.size])
        end = at + found.size
        if end > room:
            return None
        np.take(chunk, found, out=bits[at:end], mode="clip")  # while the chunk is in the cache
        np.add(found, start, out=positions[at:end])
        at = end
    return positions[:at], bits[:at]

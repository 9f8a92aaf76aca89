"""How others code an update, in bits of their payload alone, and what it leaves out.

Each takes the entries of an update, laid end to end, and the one setting it has, and is given the
best of everything else: the best scale, the cheapest indices, no header.

Shape legend: n entries, k kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

Array = NDArray[Any]

Coded = tuple[float, float]
"""Bytes, and the squared error."""


def compeft(x_n: Array, density: float) -> Coded:
    """Largest entries of all tensors together as signs and one scale, Golomb-coded (2311.13171).

    Their scale is alpha·std, alpha searched for: the best of them is the mean kept magnitude.
    """
    positions_k = _largest(x_n, density)
    kept_k = x_n[positions_k]
    sent_n = np.zeros_like(x_n)
    sent_n[positions_k] = np.sign(kept_k) * np.abs(kept_k).mean()
    gaps_k = np.diff(positions_k, prepend=-1) - 1
    share = positions_k.size / x_n.size
    # Golomb's parameter for a geometric law, and its code: unary quotient, truncated binary rest.
    most = max(1, math.ceil(-math.log2(2 - share) / math.log2(1 - share))) if share < 1 else 1
    width = max(0, math.ceil(math.log2(most)))
    short = (1 << width) - most
    rest_k = gaps_k % most
    bits = (gaps_k // most + 1 + np.where(rest_k < short, max(0, width - 1), width)).sum()
    return (bits + positions_k.size + 32) / 8, _error(x_n, sent_n)


def flasc(x_n: Array, density: float) -> Coded:
    """Largest entries in fp16 with their places (2406.05233); a mask where indices cost more."""
    positions_k = _largest(x_n, density)
    sent_n = np.zeros_like(x_n)
    sent_n[positions_k] = x_n[positions_k].astype(np.float16)
    places = min(positions_k.size * math.ceil(math.log2(x_n.size)), x_n.size)
    return (16 * positions_k.size + places) / 8, _error(x_n, sent_n)


def int8(tensors: list[Array]) -> Coded:
    """A byte an entry, one scale a tensor."""
    size, error = 0, 0.0
    for tensor in tensors:
        scale = max(float(np.abs(tensor).max()) / 127, 1e-30)
        error += _error(tensor, np.round(tensor / scale) * scale)
        size += tensor.size + 4
    return size, error


def zstd_fp16(x_n: Array) -> Coded:
    """The fp16 values through zstd at its best level."""
    half = x_n.astype(np.float16)
    return len(zstandard.ZstdCompressor(level=19).compress(half.tobytes())), _error(x_n, half)


def at_error(code: Callable[[float], Coded], error: float) -> Coded:
    """A sparse code at the smallest density whose squared error is not above this one."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if code(middle)[1] <= error else (middle, high)
    return code(high)


def _largest(x_n: Array, density: float) -> Array:
    count = max(1, round(density * x_n.size))
    return np.sort(np.argpartition(-np.abs(x_n), count - 1)[:count])


def _error(x_n: Array, sent_n: Array) -> float:
    return float(np.square(x_n.astype(float) - sent_n.astype(float)).sum())

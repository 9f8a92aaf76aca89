"""Permutations as bits, near log2(n!) of them, in a length that n alone decides.

The places of n entries are halved: a bit an entry says in which half its place lies, then, within
each half, in which quarter, until 9 to 16 are left together; the order of those is one number below
16!. Each halving costs a little more than the binomial it says, all of it under 3 % of the bits.

Every bit string that is accepted is one permutation: a half that holds too many, and a number that
is no order, are refused.

Shape legend: n entries, g groups of s entries that are left together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.wire.codecs import sparse
from anabranch.wire.errors import WireError

Array = NDArray[Any]

_TOGETHER = 16
"""The most that are left together: 16! fits 45 bits."""


def packed_bytes(entries: int) -> int:
    """Length of ``pack`` of so many places."""
    halvings = _halvings(entries) * sparse.bits_bytes(entries)
    return halvings + sum(
        sparse.bits_bytes(len(groups) * _width(size)) for size, groups in _last_groups(entries)
    )


def pack(places_n: Array) -> bytes:
    """Write a permutation.

    Args:
        places_n: The place of each entry, each of 0..n - 1 once.
    """
    count = places_n.size
    held_n = places_n
    written = []
    for level in range(_halvings(count)):
        half_n = _groups(count, level + 1)[held_n]
        written.append(sparse.pack_bits(half_n & 1 == 1))
        held_n = held_n[np.argsort(half_n, kind="stable")]
    for size, starts_g in _last_groups(count):
        orders_gs = held_n[starts_g[:, None] + np.arange(size)] - starts_g[:, None]
        numbers_g = np.zeros(len(starts_g), "<u8")
        for entry in range(size):
            below_g = (orders_gs[:, entry + 1 :] < orders_gs[:, entry, None]).sum(1)
            numbers_g += below_g.astype("<u8") * np.uint64(math.factorial(size - 1 - entry))
        bits = np.unpackbits(
            numbers_g.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little", count=_width(size)
        )
        written.append(sparse.pack_bits(bits.reshape(-1)))
    return b"".join(written)


def unpack(packed: memoryview, entries: int) -> Array:
    """Read ``pack`` of so many places.

    Args:
        packed: As many bytes as ``packed_bytes`` says.
        entries: n.

    Returns:
        The place of each entry, int64 [n].

    Raises:
        WireError: The bits are no permutation's.
    """
    entries_n = np.arange(entries)
    used = 0

    def take(bits: int) -> Array:
        nonlocal used
        part = packed[used : used + sparse.bits_bytes(bits)]
        used += len(part)
        return sparse.unpack_bits(part, bits)

    for level in range(_halvings(entries)):
        half_n = 2 * _groups(entries, level) + take(entries)
        sizes = np.bincount(half_n, minlength=2 << level)
        if not np.array_equal(sizes, np.diff(_bounds(entries, level + 1))):
            raise WireError("payload", f"ranks of {entries} entries are no permutation")
        entries_n = entries_n[np.argsort(half_n, kind="stable")]
    places_n = np.empty(entries, np.int64)
    for size, starts_g in _last_groups(entries):
        bits = np.zeros((len(starts_g), 64), np.uint8)
        width = _width(size)
        bits[:, :width] = take(len(starts_g) * width).reshape(len(starts_g), width)
        numbers_g = np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.int64)
        if (numbers_g >= math.factorial(size)).any():
            raise WireError("payload", f"ranks of {entries} entries hold a number that is no order")
        slots_gs = starts_g[:, None] + np.arange(size)
        places_n[entries_n[slots_gs]] = _orders(numbers_g, size) + starts_g[:, None]
    return places_n


def _orders(numbers_g: Array, size: int) -> Array:
    """Orders [g, s] of their numbers: digits say how many of those behind an entry are below it."""
    orders_gs = np.zeros((len(numbers_g), size), np.int64)
    for entry in range(size):
        orders_gs[:, entry], numbers_g = np.divmod(numbers_g, math.factorial(size - 1 - entry))
    for entry in reversed(range(size)):
        behind_gs = orders_gs[:, entry + 1 :]
        behind_gs += behind_gs >= orders_gs[:, entry, None]
    return orders_gs


def _halvings(entries: int) -> int:
    """How often places are halved until no more than ``_TOGETHER`` are left together."""
    return (max(1, -(-entries // _TOGETHER)) - 1).bit_length()


def _bounds(entries: int, level: int) -> Array:
    """Where the 2^level groups of places begin, and where the last one ends."""
    return (np.arange((1 << level) + 1) * entries) >> level


def _groups(entries: int, level: int) -> Array:
    """The group of each place [n]; entries that were sorted by it stand so, too."""
    return np.repeat(np.arange(1 << level), np.diff(_bounds(entries, level)))


def _last_groups(entries: int) -> Iterator[tuple[int, Array]]:
    """The groups left together: their size, and where those of it begin; sizes differ by 1."""
    bounds = _bounds(entries, _halvings(entries))
    sizes = np.diff(bounds)
    for size in np.unique(sizes).tolist():
        yield size, bounds[:-1][sizes == size]


def _width(size: int) -> int:
    """Bits of a number below size!."""
    return (math.factorial(size) - 1).bit_length()

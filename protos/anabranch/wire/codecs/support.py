"""Which entries of a frame are not zero: ascending positions as bytes, in three ways.

``RUNS`` writes each non-zero as the run of zeros before it, one byte a run ("gap8"): 0..254 is a
run and its non-zero, 255 is an escape, 255 zeros and no non-zero yet. Runs are independent draws
of a geometric law, so Huffman codes alone compress them (Golomb, 1966). ``DRAWS`` writes the same
bytes by asymmetric numeral systems (Duda, 1311.2540) under that law itself, which both ends know
from the counts: without a table it is smallest where there are few. ``MASK`` writes a bit per
entry, Huffman-coded by bytes: smallest where most entries are kept.

Of one support there is one encoding by each way, and only that one is accepted.

Shape legend: k non-zeros of a frame, r run bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from anabranch.wire import zstd
from anabranch.wire.errors import WireError

Array = NDArray[Any]

ESCAPE = 255
"""A run byte that ends at no non-zero."""

_FEW = 1 << 13
"""Non-zeros up to which ``DRAWS`` is worth its time: 2% of a payload there, 1% soon beyond, and
it decodes 30 M runs/s where zstd does 300."""

_CHUNK = 1 << 17
"""Run bytes or positions worked on at a time: what they become stays in the cache, and what fresh
memory costs, which is more than the work itself, is paid for the result alone."""

_MANY = 0.4
"""Density from which ``MASK`` can be smallest: below, runs are whole bits cheaper."""


@dataclass(frozen=True)
class Support:
    """A way to write positions.

    Attributes:
        pack: Ascending positions [k] and the frame's entries to bytes and their length before
            compression; None where another way is better.
        unpack: Bytes, their length before compression, k and the frame's entries to positions
            int64 [k], strictly ascending and in range, or a WireError. k is above 0 and not above
            the entries.
        read: The same to run bytes [r], of which so many as k end at a non-zero, the last one too;
            they may lead beyond the entries.
    """

    pack: Callable[[Array, int], tuple[bytes, int] | None]
    unpack: Callable[[memoryview, int, int, int], Array]
    read: Callable[[memoryview, int, int, int], Array]


def _pack_runs(positions_k: Array, entries: int) -> tuple[bytes, int]:
    runs_r = _runs(positions_k)
    return zstd.compress_symbols(runs_r.data), runs_r.size


def _read_runs(payload: memoryview, raw_bytes: int, count: int, entries: int) -> Array:
    _check_run_bytes(raw_bytes, count, entries)
    raw = zstd.decompress(payload, raw_bytes, raw_bytes, "payload")
    runs_r = np.frombuffer(raw, np.uint8)
    _check_ends(runs_r, count)
    return runs_r


def _unpack_runs(payload: memoryview, raw_bytes: int, count: int, entries: int) -> Array:
    return _positions(_read_runs(payload, raw_bytes, count, entries), count, entries)


def _pack_draws(positions_k: Array, entries: int) -> tuple[bytes, int] | None:
    if positions_k.size > _FEW:
        return None
    runs_r = _runs(positions_k)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(runs_r.astype(np.int32), _law(positions_k.size, entries))
    return coder.get_compressed().astype("<u4").tobytes(), runs_r.size


def _read_draws(payload: memoryview, raw_bytes: int, count: int, entries: int) -> Array:
    _check_run_bytes(raw_bytes, count, entries)
    if count > _FEW:
        raise WireError("payload", f"{count} non-zeros are coded as draws, at most {_FEW} may be")
    if len(payload) % 4:
        raise WireError("payload", f"{len(payload)} bytes are no whole number of 32-bit words")
    words = np.frombuffer(payload, "<u4").astype(np.uint32)
    if words.size and words[-1] == 0:
        raise WireError("payload", "the coded draws end in a word of zeros")
    coder = constriction.stream.stack.AnsCoder(words)
    runs_r: Array = coder.decode(_law(count, entries), raw_bytes).astype(np.uint8)
    # Decoding is a bijection: what leaves nothing behind is what encoding these runs would give.
    if not coder.is_empty():
        raise WireError("payload", "coded draws are left over after the last run")
    _check_ends(runs_r, count)
    return runs_r


def _unpack_draws(payload: memoryview, raw_bytes: int, count: int, entries: int) -> Array:
    return _positions(_read_draws(payload, raw_bytes, count, entries), count, entries)


def _law(count: int, entries: int) -> Any:
    """Of run bytes, where each entry is non-zero with probability count / entries.

    By multiplication alone: the same on every machine.
    """
    zero = 1.0 - count / entries
    runs = np.cumprod(np.concatenate([[1.0], np.full(ESCAPE, zero)]))
    runs[:ESCAPE] *= count / entries
    return constriction.stream.model.Categorical(runs, perfect=False)


def _pack_mask(positions_k: Array, entries: int) -> tuple[bytes, int] | None:
    if positions_k.size < _MANY * entries:
        return None
    bits_n = np.zeros(entries, np.bool_)
    bits_n[positions_k] = True
    mask = np.packbits(bits_n, bitorder="little")
    return zstd.compress_symbols(mask.data), mask.size


def _unpack_mask(payload: memoryview, raw_bytes: int, count: int, entries: int) -> Array:
    if raw_bytes != -(-entries // 8):
        raise WireError("counts", f"a mask of {entries} entries has {raw_bytes} bytes")
    raw = zstd.decompress(payload, raw_bytes, raw_bytes, "payload")
    positions_k = np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little"))
    if positions_k.size != count:
        raise WireError("counts", f"the mask has {positions_k.size} non-zeros, not {count}")
    _check_last(positions_k, entries)
    return positions_k


def _read_mask(payload: memoryview, raw_bytes: int, count: int, entries: int) -> Array:
    return _runs(_unpack_mask(payload, raw_bytes, count, entries))


def _runs(positions_k: Array) -> Array:
    """Run bytes [r] of ascending positions [k]."""
    runs_k, last = np.empty(positions_k.size, np.uint8), -1
    for start in range(0, positions_k.size, _CHUNK):
        part = positions_k[start : start + _CHUNK]
        gaps = np.diff(part, prepend=last)
        gaps -= 1
        if gaps.max() >= ESCAPE:
            return _long_runs(positions_k)
        runs_k[start : start + _CHUNK] = gaps
        last = part[-1]
    return runs_k


def _long_runs(positions_k: Array) -> Array:
    """The same, where some are longer than a byte can say."""
    gaps_k = np.diff(positions_k, prepend=-1)
    gaps_k -= 1
    escapes_k = gaps_k // ESCAPE
    runs_r = np.full(gaps_k.size + int(escapes_k.sum()), ESCAPE, np.uint8)
    runs_r[np.arange(gaps_k.size) + np.cumsum(escapes_k)] = gaps_k % ESCAPE
    return runs_r


def _positions(runs_r: Array, count: int, entries: int) -> Array:
    """Positions [k] of sound run bytes [r]."""
    positions_k = positions_of(runs_r, count, 0)
    _check_last(positions_k, entries)
    return positions_k


def positions_of(runs_r: Array, count: int, first: int) -> Array:
    """Where the non-zeros of run bytes lie.

    Args:
        runs_r: Run bytes [r].
        count: How many of them end at a non-zero: k.
        first: Which entry the first run starts at.

    Returns:
        int64 [k], ascending.
    """
    positions_k, at, place = np.empty(count, np.int64), 0, first - 1
    for start in range(0, runs_r.size, _CHUNK):
        part = runs_r[start : start + _CHUNK]
        ending = part != ESCAPE
        found = int(np.count_nonzero(ending))
        # A byte leads over its run, and over the non-zero where there is one.
        steps, out = part + ending.view(np.uint8), positions_k[at : at + found]
        if found == part.size:
            np.cumsum(steps, dtype=np.int64, out=out)
            out += place
            place = out[-1]
        else:
            ends = np.cumsum(steps, dtype=np.int64)
            ends += place
            out[:] = ends[ending]
            place = ends[-1]
        at += found
    return positions_k


def _check_run_bytes(raw_bytes: int, count: int, entries: int) -> None:
    """Each non-zero has its byte; the zeros can fill so many escapes and no more."""
    if not count <= raw_bytes <= count + (entries - count) // ESCAPE:
        raise WireError(
            "counts", f"{raw_bytes} run bytes cannot place {count} among {entries} entries"
        )


def _check_ends(runs_r: Array, count: int) -> None:
    """So many bytes end at a non-zero, the last one among them."""
    # One pass, where there are no escapes, which is nearly always.
    if runs_r.size == count and runs_r.max() != ESCAPE:
        return
    found = int(np.count_nonzero(runs_r != ESCAPE))
    if found != count or runs_r[-1] == ESCAPE:
        raise WireError("counts", f"the runs end {found} non-zeros, not {count}")


def _check_last(positions_k: Array, entries: int) -> None:
    if positions_k[-1] >= entries:
        raise WireError(
            "counts", f"position {positions_k[-1]} is beyond the frame's {entries} entries"
        )


RUNS = Support(_pack_runs, _unpack_runs, _read_runs)
DRAWS = Support(_pack_draws, _unpack_draws, _read_draws)
MASK = Support(_pack_mask, _unpack_mask, _read_mask)

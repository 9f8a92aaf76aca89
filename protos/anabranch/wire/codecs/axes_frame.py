"""Frames of turned matrices: high bytes of levels coded, low bits as they are.

Shape legend: r short side of a tensor taken as a matrix, n its long side or entries of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from anabranch.wire import zstd
from anabranch.wire.codecs import sparse
from anabranch.wire.codecs.axes import (
    MOST_SHIFT,
    MOST_STEP,
    TURN,
    Array,
    Axes,
    level,
    reduce,
    sides,
)
from anabranch.wire.codecs.codec import Codec, Packed, Packing, SeedOf
from anabranch.wire.codecs.dense import check_not_sparse
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo
from anabranch.wire.v1 import update_pb2 as pb


def _shift(levels_n: Array) -> int:
    """How many low bits of a row's levels travel as they are: three or so of the rest stay."""
    size = math.sqrt(float(np.square(levels_n, dtype=np.float64).mean())) if levels_n.size else 0.0
    shift = max(0, math.floor(math.log2(size / 4))) if size else 0
    least, most = (int(levels_n.min()), int(levels_n.max())) if levels_n.size else (0, 0)
    while least >> shift < -128 or most >> shift > 127:
        shift += 1
    return shift


def _pack(forms: Sequence[Axes]) -> Packed:
    rows = [row for form in forms for row in form.levels_rn]
    shifts = [_shift(row) for row in rows]
    turns = [form.turn_rr for form in forms]
    symbols = b"".join(
        [
            bytes(turn is not None for turn in turns),
            bytes(shifts),
            *(turn.tobytes() for turn in turns if turn is not None),
            *(
                (row >> shift).astype(np.int8).tobytes()
                for row, shift in zip(rows, shifts, strict=True)
            ),
        ]
    )
    low = [
        ((row[:, None] >> np.arange(shift)) & 1).astype(np.bool_).reshape(-1)
        for row, shift in zip(rows, shifts, strict=True)
    ]
    stream = zstd.compress_symbols(symbols)
    steps = np.array([form.step for form in forms], "<f4").tobytes()
    rest = steps + sparse.pack_bits(np.concatenate(low))
    payload = len(stream).to_bytes(4, "little") + stream + rest
    return Packed(payload, 4 + len(symbols) + len(rest))


def _unpack(payload: memoryview, frame: FrameInfo, seed_of: SeedOf) -> list[Axes]:
    check_not_sparse(frame)
    shapes = [sides(tensor.shape)[:2] for tensor in frame.tensors]
    count, rows = len(shapes), sum(short for short, _ in shapes)
    length = 4 + int.from_bytes(payload[:4], "little")
    if len(payload) < max(4, length) + 4 * count:
        raise WireError("counts", f"{len(payload)} bytes cannot hold {count} tensors")
    plain = count + rows + frame.entries
    most = plain + sum(short * short for short, _ in shapes if short > 1)
    raw = zstd.decompress(payload[4:length], plain, most, "payload")
    symbols = np.frombuffer(raw, np.int8)
    turned, shifts = symbols[:count].tolist(), symbols[count : count + rows].tolist()
    may_turn = [(0, 1) if short > 1 else (0,) for short, _ in shapes]
    if any(flag not in may for flag, may in zip(turned, may_turn, strict=True)):
        raise WireError("values", "a tensor is neither turned nor not")
    if not all(0 <= shift <= MOST_SHIFT for shift in shifts):
        raise WireError("values", f"levels have more than {MOST_SHIFT} low bits")
    places = [
        0,
        *accumulate(flag * short**2 for flag, (short, _) in zip(turned, shapes, strict=True)),
    ]
    if len(symbols) != plain + places[-1]:
        raise WireError("counts", f"a frame has {len(symbols)} symbols, not {plain + places[-1]}")
    turns, high_n = np.split(symbols[count + rows :], [places[-1]])
    if turns.size and int(np.abs(turns.astype(int)).max()) > TURN:
        raise WireError("values", f"a turn has an entry beyond {TURN}")
    steps = np.frombuffer(payload[length : length + 4 * count], "<f4").astype(float).tolist()
    if not all(0 <= step < MOST_STEP for step in steps):
        raise WireError("values", "a step is NaN, negative or too large")
    lengths = [long for short, long in shapes for _ in range(short)]
    bits = sum(shift * long for shift, long in zip(shifts, lengths, strict=True))
    low = payload[length + 4 * count :]
    raw_bytes = 4 + len(symbols) + 4 * count + sparse.bits_bytes(bits)
    if len(low) != sparse.bits_bytes(bits) or frame.raw_bytes != raw_bytes:
        claimed = f"the frame claims {frame.raw_bytes} bytes, not {raw_bytes}"
        raise WireError("counts", f"{len(low)} bytes should hold {bits} low bits; {claimed}")
    levels_n = _levels(high_n, low, shifts, lengths)
    cuts = [0, *accumulate(short * long for short, long in shapes)]
    return [
        Axes(
            levels_n[first:last].reshape(short, long),
            turns[start:stop].reshape(short, short) if stop > start else None,
            step,
            torch.Size(tensor.shape),
        )
        for (first, last), (start, stop), (short, long), step, tensor in zip(
            pairwise(cuts), pairwise(places), shapes, steps, frame.tensors, strict=True
        )
    ]


def _levels(high_n: Array, low: memoryview, shifts: list[int], lengths: list[int]) -> Array:
    """Levels int32 [n] of a frame, from their high bytes and the low bits."""
    levels_n = high_n.astype(np.int32)
    bits = np.frombuffer(low, np.uint8)
    total = sum(shift * long for shift, long in zip(shifts, lengths, strict=True))
    sparse.check_last_bits(low, total)
    start = place = 0
    for shift, long in zip(shifts, lengths, strict=True):
        row = levels_n[start : start + long]
        start += long
        if shift and long:
            first, skipped = divmod(place, 8)
            size = skipped + shift * long
            found = np.unpackbits(bits[first:], count=size, bitorder="little")[skipped:]
            row <<= shift
            row |= found.reshape(long, shift) @ (1 << np.arange(shift, dtype=np.int32))
            place += shift * long
    return levels_n


AXES = Codec("axes", reduce, (Packing(pb.CODEC_AXES, _pack, _unpack),), level)

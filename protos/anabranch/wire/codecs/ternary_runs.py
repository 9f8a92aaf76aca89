"""Ternary tensors as they are admitted and kept: as they travelled, not yet as positions.

That a frame places as many non-zeros in each tensor as it announces follows from sums of run
bytes. So an update is checked and weighed without positions, and held at the bytes it came in,
where positions take eight a non-zero: what is not allocated costs no page faults either, which was
half of the time. When the tensor is wanted its frame is decompressed again.

Shape legend: k non-zeros of a tensor, r run bytes, n entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.sparse import SparseTernary
from anabranch.wire.codecs import sparse
from anabranch.wire.codecs.codec import SeedOf
from anabranch.wire.codecs.support import ESCAPE, Support, positions_of
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class RunFrame:
    """The tensors of a frame that was found sound: what is known of each is a list, by row.

    Attributes:
        packed: Run bytes as they travelled: a part of the message, which must not change.
        raw_bytes: Their length unpacked.
        support: How they are packed.
        signs: uint8, packed bits of the non-zeros.
        info: The frame's row of the manifest.
        rows: Non-zeros and scales.
        cuts: Before which run byte each tensor's first run begins, and the end.
        firsts: Which bit of the signs is each tensor's first, and the end.
        befores: Where each tensor's first run starts, counted from its first entry: 0 or less,
            since a run may start in an earlier tensor.
    """

    packed: memoryview
    raw_bytes: int
    support: Support
    signs: Array
    info: FrameInfo
    rows: sparse.Rows
    cuts: list[int]
    firsts: list[int]
    befores: list[int]

    @cached_property
    def runs_r(self) -> Array:
        """Run bytes uint8 [r], unpacked again, once for all tensors of the frame."""
        count, entries = self.rows.total, self.info.entries
        if not count:
            return np.zeros(0, np.uint8)
        return self.support.read(self.packed, self.raw_bytes, count, entries)


@dataclass(frozen=True, eq=False)
class TernaryRuns:
    """A tensor whose entries are 0, +scale or -scale; one that ``unpack`` made is sound.

    Attributes:
        frame: The frame it travelled in.
        row: Which of its tensors it is.
    """

    frame: RunFrame
    row: int

    @property
    def nonzeros(self) -> int:
        """Entries that are not 0."""
        return self.frame.rows.nonzeros[self.row]

    @property
    def scale(self) -> float:
        """What each of them weighs; 0 exactly when there are none."""
        return self.frame.rows.scales[self.row]

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense tensor."""
        return torch.Size(self.frame.info.tensors[self.row].shape)

    @property
    def nbytes(self) -> int:
        """Bytes it takes: its share of the frame's."""
        if not self.nonzeros:
            return 0
        share = self.nonzeros / self.frame.rows.total
        return math.ceil(len(self.frame.packed) * share) + sparse.bits_bytes(self.nonzeros)

    @property
    def runs_r(self) -> Array:
        """Its run bytes uint8 [r]: those that end with its last non-zero."""
        return self.frame.runs_r[self.frame.cuts[self.row] : self.frame.cuts[self.row + 1]]

    def norm(self) -> float:
        """‖·‖₂ in fp64, from the count of non-zeros."""
        return self.scale * math.sqrt(self.nonzeros)

    def sparse(self) -> SparseTernary:
        """The same as positions and signs, for what merges those."""
        positions_k = positions_of(self.runs_r, self.nonzeros, self.frame.befores[self.row])
        first, skipped = divmod(self.frame.firsts[self.row], 8)
        signs, count = self.frame.signs[first:], skipped + self.nonzeros
        bits = np.unpackbits(signs, count=count, bitorder="little")
        negative_k = torch.from_numpy(bits[skipped:].view(np.bool_))
        return SparseTernary(torch.from_numpy(positions_k), negative_k, self.scale, self.shape)

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        return self.sparse().dense()

    def write(self, out_n: Tensor) -> None:
        """Write the entries, in row order, into floating-point ``out_n`` [n] on any device.

        Run bytes and packed signs go there as they are; positions are made of them there.
        """
        out_n.zero_()
        if not self.nonzeros:
            return
        start = self.frame.firsts[self.row]
        first, skipped = divmod(start, 8)
        last = sparse.bits_bytes(start + self.nonzeros)
        # Copies: what zstd gave is read-only, which torch has no word for.
        runs_r = torch.from_numpy(self.runs_r.copy()).to(out_n.device)
        signs = torch.from_numpy(self.frame.signs[first:last].copy()).to(out_n.device)
        ending_r = runs_r != ESCAPE
        positions_k = torch.cumsum(runs_r.long() + ending_r, 0)
        positions_k += self.frame.befores[self.row] - 1
        if len(runs_r) > self.nonzeros:
            positions_k = positions_k[ending_r]
        shifts = torch.arange(8, dtype=torch.uint8, device=out_n.device)
        bits = ((signs[:, None] >> shifts) & 1).reshape(-1)[skipped : skipped + self.nonzeros]
        out_n[positions_k] = (1 - 2 * bits.to(out_n.dtype)) * self.scale


def unpack(
    payload: memoryview, frame: FrameInfo, seed_of: SeedOf, support: Support
) -> list[TernaryRuns]:
    """A frame of a support and signs, as ``Packing.unpack`` does it."""
    rows = sparse.read_rows(frame)
    packed, rest = sparse.split(support, payload, frame, rows, sparse.bits_bytes(rows.total))
    sparse.check_last_bits(rest, rows.total)
    raw_bytes, firsts = frame.raw_bytes - len(rest), [0, *accumulate(rows.nonzeros)]
    cuts, befores = firsts, [0] * len(firsts)
    if rows.total:
        runs_r = support.read(packed, raw_bytes, rows.total, frame.entries)
        cuts = _cuts(runs_r, firsts)
        befores = _befores(runs_r, frame, rows.nonzeros, cuts)
    signs = np.frombuffer(rest, np.uint8)
    held = RunFrame(packed, raw_bytes, support, signs, frame, rows, cuts, firsts, befores)
    return [TernaryRuns(held, row) for row in range(len(frame.tensors))]


def _cuts(runs_r: Array, firsts: list[int]) -> list[int]:
    """Before which run byte each tensor's first run begins, and the end."""
    if runs_r.size == firsts[-1]:
        return firsts
    ends_k = np.flatnonzero(runs_r != ESCAPE)
    return [int(ends_k[first - 1]) + 1 if first else 0 for first in firsts]


def _befores(
    runs_r: Array, frame: FrameInfo, nonzeros: tuple[int, ...], cuts: list[int]
) -> list[int]:
    """``RunFrame.befores``, where all non-zeros of each tensor lie within it.

    A run byte leads over so many entries, and one that is no escape over its non-zero too.
    """
    kept = [cut for cut, count in zip(cuts, nonzeros, strict=False) if count]
    steps = iter(np.add.reduceat(runs_r, kept, dtype=np.int64).tolist())
    heads = iter(runs_r[kept].tolist())
    befores, place, start = [], 0, 0
    for tensor, count, cut in zip(frame.tensors, nonzeros, cuts, strict=False):
        befores.append(place - start)
        end = start + tensor.entries
        if count:
            head = next(heads)
            first = place + (head if head != ESCAPE else _first_run(runs_r, cut))
            place += next(steps) + count
            if first < start or place > end:
                _refuse(place, frame.entries)
        start = end
    return befores


def _refuse(place: int, entries: int) -> NoReturn:
    if place > entries:
        raise WireError("counts", f"position {place - 1} is beyond the frame's {entries} entries")
    raise WireError("counts", "non-zeros lie in other tensors than announced")


def _first_run(runs_r: Array, cut: int) -> int:
    """Entries that the run beginning at this byte leads over, its non-zero not counted."""
    entries = 0
    while runs_r[cut] == ESCAPE:
        entries, cut = entries + ESCAPE, cut + 1
    return entries + int(runs_r[cut])

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
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.sparse import SparseTernary
from anabranch.wire.codecs import sparse
from anabranch.wire.codecs.codec import SeedOf
from anabranch.wire.codecs.support import ESCAPE, Support, steps_of
from anabranch.wire.errors import WireError
from anabranch.wire.manifest import FrameInfo

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class RunFrame:
    """The run bytes of a frame that was found sound.

    Attributes:
        packed: As they travelled: a part of the message, which must not change.
        raw_bytes: Their length unpacked.
        nonzeros: Of the frame.
        entries: Of the frame.
        support: How they are packed.
    """

    packed: memoryview
    raw_bytes: int
    nonzeros: int
    entries: int
    support: Support

    def read(self) -> Array:
        """Run bytes uint8 [r]."""
        return self.support.read(self.packed, self.raw_bytes, self.nonzeros, self.entries)

    @cached_property
    def runs_r(self) -> Array:
        """``read``, once for all tensors of the frame."""
        return self.read()


@dataclass(frozen=True, eq=False)
class TernaryRuns:
    """A tensor whose entries are 0, +scale or -scale; one that ``unpack`` made is sound.

    Attributes:
        frame: Where its run bytes are; None where it has no non-zeros.
        cut: Which of them are its own: those that end with its last non-zero.
        before: Where the first run starts, counted from the tensor's first entry: 0 or less, since
            a run may start in an earlier tensor.
        signs: uint8, packed bits of the frame's non-zeros.
        first_sign: Which of those bits is the tensor's first.
        nonzeros: Entries that are not 0.
        scale: What each of them weighs; 0 exactly when there are none.
        shape: Shape of the dense tensor.
    """

    frame: RunFrame | None
    cut: slice
    before: int
    signs: Array
    first_sign: int
    nonzeros: int
    scale: float
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes it takes: its share of the frame's."""
        if self.frame is None:
            return 0
        share = self.nonzeros / self.frame.nonzeros
        return math.ceil(len(self.frame.packed) * share) + sparse.bits_bytes(self.nonzeros)

    @property
    def runs_r(self) -> Array:
        """Its run bytes uint8 [r]."""
        return np.zeros(0, np.uint8) if self.frame is None else self.frame.runs_r[self.cut]

    def norm(self) -> float:
        """‖·‖₂ in fp64, from the count of non-zeros."""
        return self.scale * math.sqrt(self.nonzeros)

    def sparse(self) -> SparseTernary:
        """The same as positions and signs, for what merges those."""
        steps_r, ending_r = steps_of(self.runs_r)
        ends_r = np.cumsum(steps_r, dtype=np.int64)
        ends_r += self.before - 1  # a step leads past its non-zero
        positions_k = ends_r if ends_r.size == self.nonzeros else ends_r[ending_r]
        first, skipped = divmod(self.first_sign, 8)
        bits = np.unpackbits(self.signs[first:], count=skipped + self.nonzeros, bitorder="little")
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
        first, skipped = divmod(self.first_sign, 8)
        last = sparse.bits_bytes(self.first_sign + self.nonzeros)
        # Copies: what zstd gave is read-only, which torch has no word for.
        runs_r = torch.from_numpy(self.runs_r.copy()).to(out_n.device)
        signs = torch.from_numpy(self.signs[first:last].copy()).to(out_n.device)
        ending_r = runs_r != ESCAPE
        positions_k = torch.cumsum(runs_r.long() + ending_r, 0) + (self.before - 1)
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
    signs = np.frombuffer(rest, np.uint8)
    shapes = [torch.Size(tensor.shape) for tensor in frame.tensors]
    if not rows.total:
        return [TernaryRuns(None, slice(0), 0, signs, 0, 0, 0.0, shape) for shape in shapes]
    held = RunFrame(packed, frame.raw_bytes - len(rest), rows.total, frame.entries, support)
    runs_r = held.read()
    firsts = [0, *accumulate(rows.nonzeros)]
    cuts = _cuts(runs_r, firsts)
    befores = _befores(runs_r, frame, rows.nonzeros, cuts)
    return [
        TernaryRuns(held, slice(cut, end), before, signs, first, count, scale, shape)
        for (cut, end), before, first, count, scale, shape in zip(
            pairwise(cuts), befores, firsts, rows.nonzeros, rows.scales, shapes, strict=False
        )
    ]


def _cuts(runs_r: Array, firsts: list[int]) -> list[int]:
    """Before which run byte each tensor's first run begins, and the end."""
    if runs_r.size == firsts[-1]:
        return firsts
    ends_k = np.flatnonzero(runs_r != ESCAPE)
    return [int(ends_k[first - 1]) + 1 if first else 0 for first in firsts]


def _befores(
    runs_r: Array, frame: FrameInfo, nonzeros: tuple[int, ...], cuts: list[int]
) -> list[int]:
    """``TernaryRuns.before`` of each tensor, all of whose non-zeros lie within it.

    A run byte leads over so many entries, and one that is no escape over its non-zero too.
    """
    kept = [row for row, count in enumerate(nonzeros) if count]
    lengths = np.add.reduceat(runs_r, [cuts[row] for row in kept], dtype=np.int64).tolist()
    befores, place, start, steps = [], 0, 0, dict(zip(kept, lengths, strict=True))
    for row, (tensor, count) in enumerate(zip(frame.tensors, nonzeros, strict=True)):
        befores.append(place - start)
        if count:
            first = place + _first_run(runs_r, cuts[row])
            place += steps[row] + count
            if first < start or place > start + tensor.entries:
                if place > frame.entries:
                    raise WireError(
                        "counts",
                        f"position {place - 1} is beyond the frame's {frame.entries} entries",
                    )
                raise WireError("counts", "non-zeros lie in other tensors than announced")
        start += tensor.entries
    return befores


def _first_run(runs_r: Array, cut: int) -> int:
    """Entries that the run beginning at this byte leads over, its non-zero not counted."""
    entries = 0
    while runs_r[cut] == ESCAPE:
        entries, cut = entries + ESCAPE, cut + 1
    return entries + int(runs_r[cut])

"""Matrices turned to their principal axes, then rounded to even steps and coded (Goyal 2001).

Rows of a factor move together, more so the smaller the rank: along the axes of their covariance
some hardly move at all, and take few bits at the same step. An orthogonal matrix of the short side,
coarsely rounded, is all that this costs; one for which it does not pay travels as it is. The step
is one for the whole update, which at a given squared error is the least bits. A level's low bits,
which are as good as uniform, travel as they are; the rest, Huffman-coded.

What is decoded is whole numbers in fp64, which are exact in any order, times one number: the same
bits on every machine.

Shape legend: r short side of a tensor taken as a matrix, n its long side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.wire.config import CodecConfig

Array = NDArray[Any]

_LONGEST = 64
"""Short sides that are turned: beyond, the turn costs what it saves."""

TURN = 31
"""A turn's entries are whole numbers from minus this to this."""

_TURN_BITS = 5.5
"""What each costs, coded, for the choice between turned and not."""

MOST_SHIFT = 16
"""Low bits of a level, beside a byte."""

MOST_STEP = float(np.finfo(np.float32).max) / (_LONGEST * (1 << (8 + MOST_SHIFT)))
"""So that no entry leaves fp32."""


@dataclass(frozen=True, eq=False)
class Axes:
    """A tensor as levels along its axes.

    Attributes:
        levels_rn: int32 [r, n], or [1, r·n] where it is not turned and r is 1 or above 64.
        turn_rr: int8 [r, r]: entry times 31 of the matrix that turns levels back; None for none.
        step: What a level is worth, an fp32 value.
        shape: Shape of the dense tensor.
    """

    levels_rn: Array
    turn_rr: Array | None
    step: float
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.levels_rn.nbytes + (0 if self.turn_rr is None else self.turn_rr.nbytes)

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        whole_rn, worth = self._whole()
        return _from_rows((whole_rn * worth).astype(np.float32), self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64."""
        whole_rn, worth = self._whole()
        return worth * float(np.linalg.norm(whole_rn))

    def _whole(self) -> tuple[Array, float]:
        """Whole numbers [r, n] in fp64, and what one is worth."""
        levels_rn = self.levels_rn.astype(np.float64)
        if self.turn_rr is None:
            return levels_rn, self.step
        return self.turn_rr.astype(np.float64) @ levels_rn, self.step / TURN


def sides(shape: Sequence[int]) -> tuple[int, int, bool]:
    """Rows and columns that a tensor is taken as, and whether that is transposed."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    short = min(rows, columns)
    if not 1 < short <= _LONGEST:
        return 1, rows * columns, False
    return short, max(rows, columns), rows > columns


def _to_rows(tensor: Tensor) -> Array:
    rows, columns, transposed = sides(tensor.shape)
    entries_n: Array = tensor.detach().to("cpu", torch.float64).reshape(-1).numpy()
    return entries_n.reshape(columns, rows).T if transposed else entries_n.reshape(rows, columns)


def _from_rows(entries_rn: Array, shape: torch.Size) -> Tensor:
    transposed = sides(shape)[2]
    entries_rn = np.ascontiguousarray(entries_rn.T if transposed else entries_rn)
    return torch.from_numpy(entries_rn).reshape(shape)


def reduce(tensor: Tensor, config: CodecConfig, seed: int) -> Axes:
    """Turn where it pays, and round: ``Codec.reduce``."""
    entries_rn = _to_rows(tensor)
    if not np.isfinite(entries_rn).all():
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    rows = entries_rn.shape[0]
    mean_square = float(np.square(entries_rn).mean()) if entries_rn.size else 0.0
    largest = float(np.abs(entries_rn).max()) if entries_rn.size else 0.0
    # Of all rotations none makes a coordinate larger than √r times the largest there was.
    least = math.sqrt(rows) * largest / (1 << (6 + MOST_SHIFT))
    step = float(np.float32(max(math.sqrt(12 * config.loss * mean_square), least)))
    if step >= MOST_STEP:
        raise ValueError("the tensor holds entries beyond the range of a turned code")
    if step == 0:
        return Axes(np.zeros(entries_rn.shape, np.int32), None, 0.0, tensor.shape)
    plain_rn = np.rint(entries_rn / step)
    if rows > 1:
        axes_rr = np.linalg.eigh(entries_rn @ entries_rn.T)[1]
        turn_rr = np.rint(axes_rr * TURN)
        turned_rn = np.rint(np.linalg.solve(turn_rr / TURN, entries_rn) / step)
        if _bits(turned_rn) + _TURN_BITS * rows * rows < _bits(plain_rn):
            levels_rn, turn = turned_rn.astype(np.int32), turn_rr.astype(np.int8)
            return Axes(levels_rn, turn, step, tensor.shape)
    return Axes(plain_rn.astype(np.int32), None, step, tensor.shape)


def _bits(levels_rn: Array) -> float:
    """About what levels cost, were each row normal."""
    squares_r = np.square(levels_rn).mean(axis=1)
    return float(0.5 * np.log2(1 + 2 * math.pi * math.e * squares_r).sum() * levels_rn.shape[1])


def level(tensors: Mapping[str, Tensor], config: CodecConfig) -> dict[str, CodecConfig]:
    """Each tensor's loss such that all of them have one step."""
    squares = {name: float(part.detach().double().square().sum()) for name, part in tensors.items()}
    entries = sum(part.numel() for part in tensors.values())
    whole = sum(squares.values()) / max(1, entries)
    return {
        name: config.model_copy(update={"loss": config.loss * whole * part.numel() / squares[name]})
        for name, part in tensors.items()
        if squares[name] > 0 and math.isfinite(whole)
    }

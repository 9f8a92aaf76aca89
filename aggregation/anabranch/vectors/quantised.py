"""Blockwise int8 tensors: a byte per entry and a scale per block (LLM.int8 and 2110.02861).

Shape legend: n entries of the tensor, g blocks, s entries of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Entries that share a scale: 6% of overhead, and one outlier spoils no more than these."""

_LEVELS = 127

_LARGEST_SCALE = (1 - 2**-23) * torch.finfo(torch.float32).max / _LEVELS
"""So that the largest level times the scale stays finite."""


@dataclass(frozen=True, eq=False)
class Int8Blocks:
    """A tensor as int8 levels, each block of ``BLOCK`` consecutive entries with its own scale.

    Attributes:
        levels_n: int8 [n], in -127..127.
        scales_g: fp32 [g], finite and not negative; g = ceil(n / BLOCK).
        shape: Shape of the dense tensor.
    """

    levels_n: Tensor
    scales_g: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        entries = math.prod(self.shape)
        if self.levels_n.shape != (entries,) or self.scales_g.shape != (blocks_of(entries),):
            raise ValueError(
                f"shape {self.shape} needs {entries} levels and {blocks_of(entries)} scales; "
                f"got {tuple(self.levels_n.shape)} and {tuple(self.scales_g.shape)}"
            )

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        entries_gs = _blocks(self.levels_n.float()) * self.scales_g[:, None]
        return entries_gs.reshape(-1)[: self.levels_n.numel()].reshape(self.shape)


def blocks_of(entries: int) -> int:
    """Blocks that hold so many entries; the last may be short."""
    return -(-entries // BLOCK)


def quantise(x: Tensor) -> Int8Blocks:
    """Round every entry to 255 levels between plus and minus its block's largest magnitude.

    Args:
        x: Entries of any shape, floating dtype and device; read in fp32.

    Returns:
        The blocks, on the CPU; no entry is off by more than its block's largest / 254.

    Raises:
        ValueError: An entry is NaN or infinite.
    """
    entries_n = x.detach().to("cpu", torch.float32).reshape(-1)
    if not bool(torch.isfinite(entries_n).all()):
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    entries_gs = _blocks(entries_n)
    largest_g = entries_gs.abs().amax(dim=1) if entries_n.numel() else entries_n
    scales_g = (largest_g / _LEVELS).clamp(max=_LARGEST_SCALE)
    # A scale that is zero, or too small for fp32, makes 0/0 and x/0: those levels are 0 or the end.
    levels_gs = (entries_gs / scales_g[:, None]).nan_to_num_(nan=0.0).round_()
    levels_n = levels_gs.clamp_(-_LEVELS, _LEVELS).to(torch.int8).reshape(-1)
    return Int8Blocks(levels_n[: entries_n.numel()].clone(), scales_g, tuple(x.shape))


def _blocks(entries_n: Tensor) -> Tensor:
    """[n] padded with zeros to [g, s]."""
    missing = blocks_of(entries_n.numel()) * BLOCK - entries_n.numel()
    return torch.nn.functional.pad(entries_n, (0, missing)).reshape(-1, BLOCK)

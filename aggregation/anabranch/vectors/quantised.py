"""Blockwise quantised tensors: a whole number per entry and a scale per block (2110.02861).

Shape legend: n entries of the tensor, g blocks, s entries of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Entries that share a scale: half a bit each, and one outlier spoils no more than these."""

INT8, INT4 = 127, 7
"""Largest level that eight and four bits hold beside its negative."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A tensor as levels, each block of ``BLOCK`` consecutive entries with its own scale.

    Attributes:
        levels_n: int8 [n].
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

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.levels_n.nbytes + self.scales_g.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        full = self.levels_n.numel() // BLOCK
        cut = full * BLOCK
        # In one pass, and the last, short block by itself: no padded copy is made.
        # numpy's large arrays are in huge pages, which are 10x cheaper to get.
        entries_n = torch.from_numpy(np.empty(self.levels_n.numel(), np.float32))
        torch.mul(
            self.levels_n[:cut].view(full, BLOCK),
            self.scales_g[:full, None],
            out=entries_n[:cut].view(full, BLOCK),
        )
        torch.mul(self.levels_n[cut:], self.scales_g[full:], out=entries_n[cut:])
        return entries_n.reshape(self.shape)

    def norm(self) -> float:
        """‖·‖₂ in fp64, from sums of squared levels."""
        levels_n = self.levels_n.numpy().astype(np.float32)
        scales_g = self.scales_g.numpy().astype(np.float64)
        full = levels_n.size // BLOCK
        levels_gs, rest = levels_n[: full * BLOCK].reshape(full, BLOCK), levels_n[full * BLOCK :]
        # Whole numbers below 2^24: exact in fp32.
        squares_g = np.einsum("gs,gs->g", levels_gs, levels_gs).astype(np.float64)
        total = (scales_g[:full] ** 2) @ squares_g
        return math.sqrt(total + (scales_g[full] ** 2 * float(rest @ rest) if rest.size else 0.0))


def blocks_of(entries: int) -> int:
    """Blocks that hold so many entries; the last may be short."""
    return -(-entries // BLOCK)


def quantise(x: Tensor, largest_level: int = INT8) -> Blocks:
    """Round every entry to a level between plus and minus its block's largest magnitude.

    Args:
        x: Entries of any shape, floating dtype and device; read in fp32.
        largest_level: ``INT8`` or ``INT4``: levels lie between this and its negative.

    Returns:
        The blocks, on the CPU; no entry is off by more than its block's largest over twice
        ``largest_level``.

    Raises:
        ValueError: An entry is NaN or infinite.
    """
    entries_n = x.detach().to("cpu", torch.float32).reshape(-1)
    if not bool(torch.isfinite(entries_n).all()):
        raise ValueError("the tensor holds NaN or infinite entries: the training diverged")
    entries_gs = _blocks(entries_n)
    largest_g = entries_gs.abs().amax(dim=1) if entries_n.numel() else entries_n
    # So that the largest level times the scale stays finite.
    most = (1 - 2**-23) * torch.finfo(torch.float32).max / largest_level
    scales_g = (largest_g / largest_level).clamp(max=most)
    # A scale that is zero, or too small for fp32, makes 0/0 and x/0: those levels are 0 or the end.
    levels_gs = (entries_gs / scales_g[:, None]).nan_to_num_(nan=0.0).round_()
    levels_n = levels_gs.clamp_(-largest_level, largest_level).to(torch.int8).reshape(-1)
    return Blocks(levels_n[: entries_n.numel()].clone(), scales_g, tuple(x.shape))


def _blocks(entries_n: Tensor) -> Tensor:
    """[n] padded with zeros to [g, s]."""
    missing = blocks_of(entries_n.numel()) * BLOCK - entries_n.numel()
    return torch.nn.functional.pad(entries_n, (0, missing)).reshape(-1, BLOCK)

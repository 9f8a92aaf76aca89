"""Sparse ternary tensors: the largest entries as a sign times one scale (ComPEFT, 2311.13171).

Shape legend: n entries of the tensor, k kept.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.vectors.select import keep


@dataclass(frozen=True, eq=False)
class SparseTernary:
    """A tensor whose entries are 0, +scale or -scale. One that exists is sound: kernels trust it.

    Attributes:
        positions_k: int64 [k] on the CPU, strictly ascending, into the flattened tensor.
        negative_k: bool [k] on the CPU, True where the entry is -scale.
        scale: What a kept entry weighs; an fp32 value, 0 exactly when k is 0.
        shape: Shape of the dense tensor.

    Raises:
        ValueError: It is not so.
    """

    positions_k: Tensor
    negative_k: Tensor
    scale: float
    shape: torch.Size

    def __post_init__(self) -> None:
        if self.positions_k.shape != self.negative_k.shape or self.positions_k.ndim != 1:
            raise ValueError(
                f"positions are {tuple(self.positions_k.shape)} and signs "
                f"{tuple(self.negative_k.shape)}; give one sign per position, both [k]"
            )
        kinds = (self.positions_k.dtype, self.negative_k.dtype)
        if kinds != (torch.int64, torch.bool) or not (
            self.positions_k.is_cpu and self.negative_k.is_cpu
        ):
            devices = sorted({self.positions_k.device.type, self.negative_k.device.type})
            raise ValueError(
                f"positions and signs are {kinds} on {devices}; give int64 and bool on cpu"
            )
        count = self.positions_k.shape[0]
        fp32 = math.isfinite(self.scale) and ctypes.c_float(self.scale).value == self.scale
        if not fp32 or self.scale < 0 or (self.scale == 0) != (count == 0):
            raise ValueError(
                f"the scale of {count} non-zeros is {self.scale}; give an fp32 number "
                "above 0, or 0 where there are none"
            )
        if count:
            positions_k = self.positions_k.numpy()  # compares 5x faster than torch does
            first, last = int(positions_k[0]), int(positions_k[-1])
            ascending = bool((positions_k[1:] > positions_k[:-1]).all())
            if first < 0 or last >= self.entries or not ascending:
                raise ValueError(
                    f"positions from {first} to {last} do not ascend within {self.entries} "
                    "entries; sort them and leave out repeated ones"
                )

    @property
    def entries(self) -> int:
        """All entries of the dense tensor."""
        return self.shape.numel()

    @property
    def nonzeros(self) -> int:
        """Entries that are not 0."""
        return self.positions_k.numel()

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.positions_k.nbytes + self.negative_k.nbytes

    def dense(self) -> Tensor:
        """The tensor itself, fp32 of ``shape``."""
        # numpy's zeros are the system's own, which are not written twice, in huge pages.
        entries_n = np.zeros(self.entries, np.float32)
        entries_n[self.positions_k.numpy()] = self._values(slice(None))
        return torch.from_numpy(entries_n).reshape(self.shape)

    def read(self, first: int, out_L: Tensor) -> None:
        """Write the entries from ``first`` on, in row order, into fp32 ``out_L`` [L] on the CPU."""
        out_L.zero_()
        ends = torch.tensor([first, first + len(out_L)])
        low, high = torch.searchsorted(self.positions_k, ends).tolist()
        # numpy scatters 3x faster than torch's index_put on one thread; the memory is shared.
        positions_k = self.positions_k[low:high].numpy() - first
        out_L.numpy()[positions_k] = self._values(slice(low, high))

    def _values(self, kept: slice) -> NDArray[np.float32]:
        """The entries of these non-zeros, fp32; exact, and 10x faster than a choice of two."""
        values_k: NDArray[np.float32] = self.negative_k[kept].numpy().astype(np.float32)
        values_k *= np.float32(-2)
        values_k += np.float32(1)
        values_k *= np.float32(self.scale)
        return values_k

    def norm(self) -> float:
        """‖·‖₂ in fp64, from the count of non-zeros."""
        return self.scale * math.sqrt(self.nonzeros)


def ternarise(x: Tensor, density: float) -> SparseTernary:
    """Keep a share of the entries, largest first, as a sign times their mean magnitude.

    The mean of the kept magnitudes is the least-squares scale in closed form; ComPEFT's own,
    alpha·std(x), needs a search over alpha to come near it.

    Args:
        x: Entries of any shape, floating dtype and device; read in fp32.
        density: Share kept, in (0, 1]: k = max(1, round(density·n)), or the number of non-zero
            entries when that is smaller, for a zero is best sent as a zero.

    Raises:
        ValueError: ``density`` is out of range, or an entry is NaN or infinite.
    """
    positions_k, values_k = keep(x, density)
    # Summed in fp64, rounded once to the fp32 that travels.
    scale = float(np.float32(np.abs(values_k).mean(dtype=np.float64))) if values_k.size else 0.0
    return SparseTernary(
        torch.from_numpy(positions_k), torch.from_numpy(values_k < 0), scale, x.shape
    )


def nothing(shape: torch.Size) -> SparseTernary:
    """A tensor of zeros."""
    return SparseTernary(
        torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), 0.0, shape
    )

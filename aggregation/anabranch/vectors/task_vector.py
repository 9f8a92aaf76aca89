"""Task vectors: what fine-tuning adds to the base, by module.

Shape legend: m rows (out features), n columns (in features), k inner rank of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.vectors.sparse import SparseTernary


@dataclass(frozen=True)
class LowRank:
    """A matrix ΔW held as the product of two factors; any LoRA scaling is folded into ``b_mk``.

    Attributes:
        b_mk: Left factor [m, k].
        a_kn: Right factor [k, n].
    """

    b_mk: Tensor
    a_kn: Tensor

    def __post_init__(self) -> None:
        if self.b_mk.ndim != 2 or self.a_kn.ndim != 2 or self.b_mk.shape[1] != self.a_kn.shape[0]:
            raise ValueError(
                f"factors do not multiply: b is {tuple(self.b_mk.shape)}, "
                f"a is {tuple(self.a_kn.shape)}; give b [m, k] and a [k, n]"
            )

    @property
    def shape(self) -> torch.Size:
        """[m, n], the shape of the product."""
        return torch.Size((self.b_mk.shape[0], self.a_kn.shape[1]))

    @property
    def rank(self) -> int:
        """Inner dimension k: an upper bound on the matrix rank."""
        return self.b_mk.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the product [stop - start, n], in fp32."""
        return self.b_mk[start:stop].float() @ self.a_kn.float()

    def dense(self) -> Tensor:
        """The whole product [m, n], in fp32."""
        return self.rows(0, self.b_mk.shape[0])

    def norm(self) -> float:
        """‖B·A‖_F from the factors: √tr((BᵀB)(AAᵀ)), fp64, without forming the product."""
        b_mk, a_kn = self.b_mk.double(), self.a_kn.double()
        return math.sqrt(max(0.0, float(((b_mk.T @ b_mk) * (a_kn @ a_kn.T)).sum())))


@dataclass(frozen=True)
class Stored:
    """A change that is read from disk when it is needed, a stretch at a time.

    Attributes:
        shape: Its shape.
        read: ``read(first, out_L)`` writes the entries from ``first`` on, in row order, into fp32
            ``out_L`` [L] on the CPU. It raises ValueError for one that is not finite.
    """

    shape: torch.Size
    read: Callable[[int, Tensor], None]

    def dense(self) -> Tensor:
        """All entries, in fp32."""
        out_D = torch.empty(self.shape.numel(), dtype=torch.float32)
        self.read(0, out_D)
        return out_D.view(self.shape)


Held = LowRank | Tensor
"""One module's change in memory: two factors, or the entries themselves."""

Streamed = Stored | SparseTernary
"""A change whose entries are written out by ``read``, a stretch at a time: stored, or sparse."""

Delta = Held | Streamed
"""One module's change: held in memory as it is, or streamed."""


def held(delta: Delta) -> Held:
    """A change in memory; a streamed one is read."""
    return delta.dense() if isinstance(delta, Streamed) else delta


@dataclass(frozen=True)
class TaskVector:
    """What one client's training adds to the base.

    Attributes:
        deltas: Change per module, by name; iterated in sorted order everywhere.
        base_hash: ``weights_hash`` of the base the change belongs to; None when unknown.
        importance: How much each entry matters to who trained it (``vectors.importance``), by
            module; empty when nobody asked.
    """

    deltas: Mapping[str, Delta]
    base_hash: str | None = None
    importance: Mapping[str, Delta] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Module names in the one order everything uses."""
        return sorted(self.deltas)

    def items(self) -> Iterator[tuple[str, Delta]]:
        """Pairs of name and change, in sorted order."""
        return ((name, self.deltas[name]) for name in self.names())


def stack(parts: list[LowRank]) -> LowRank:
    """The exact sum of products: factors side by side, inner rank Σ k_i (FLoRA, 2409.05976)."""
    return LowRank(
        torch.cat([part.b_mk.float() for part in parts], dim=1),
        torch.cat([part.a_kn.float() for part in parts], dim=0),
    )


def scaled(delta: Delta, factor: float) -> Held:
    """``factor`` times a change, in the same form; a streamed one is read."""
    change = held(delta)
    if isinstance(change, LowRank):
        return LowRank(change.b_mk * factor, change.a_kn)
    return change * factor


def norm(delta: Delta) -> float:
    """‖ΔW‖_F in fp64; a stored one is read."""
    if isinstance(delta, LowRank | SparseTernary):
        return delta.norm()
    change = held(delta)
    assert isinstance(change, Tensor)
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))

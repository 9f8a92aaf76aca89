"""The small space that holds a module's task vectors, and singular vectors that mean something.

QR of the stacked B and of the stacked Aᵀ turns every τ_i = B_i·A_i into a core of at most K x K,
itself a product of inner rank k_i, so that many contributions cost no C·K² of memory.
The bases are orthonormal, so whatever commutes with rotations (SVD, polar factor, sums) is done on
the cores and lifted back: the result is exact and no m x n matrix is formed. Dense task vectors are
their own cores.

A task vector of rank r has min(m, n) − r singular vectors whose value is zero and whose direction
is chance: a change of 1e-6 turns them anywhere. Methods that give every direction the same say must
not see them, so ``directions`` leaves them out, in the core and in dense matrices alike.

Shape legend: C contributions, m rows, n columns, k_i inner ranks, K = Σ k_i, p and q rows and
columns of a core, r singular directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.vectors.task_vector import Held, LowRank

ZERO = 1e-6
"""Singular values up to this share of the largest count as zero. Task vectors are fp32: summing a
few products leaves noise of some 1e-7. The difference of two whole models carries more, their own
rounding, and is of full rank by it: limit the rank by the method's ``rank``."""


class Directions(NamedTuple):
    """Singular triplets, largest first, in fp64: u [p, r], s [r], v [r, q]."""

    u_pr: Tensor
    s_r: Tensor
    v_rq: Tensor

    def matrix(self) -> Tensor:
        """What they are the triplets of [p, q]."""
        return (self.u_pr * self.s_r) @ self.v_rq


@dataclass(frozen=True)
class CoreSpace:
    """Task vectors of one module in a space they share.

    Attributes:
        cores: One [p, q] per contribution: fp64 products where they come from factors, else the
            entries.
        left_mp: Orthonormal basis of their columns [m, p]; None where the cores are the entries.
        right_nq: Orthonormal basis of their rows [n, q]; None where the cores are the entries.
    """

    cores: tuple[Held, ...]
    left_mp: Tensor | None = None
    right_nq: Tensor | None = None

    def total(self, weights_C: Tensor) -> Tensor:
        """Σ w_i core_i [p, q], fp64."""
        first = self.cores[0]
        device = first.b_mk.device if isinstance(first, LowRank) else first.device
        total_pq = torch.zeros(first.shape, dtype=torch.float64, device=device)
        for core, weight in zip(self.cores, weights_C.tolist(), strict=True):
            if isinstance(core, LowRank):
                total_pq.addmm_(core.b_mk, core.a_kn, alpha=weight)
            else:
                total_pq.add_(core, alpha=weight)
        return total_pq

    def joint(self) -> Directions:
        """The SVD of all task vectors side by side, its right vectors in bases of their own.

        A core times an isometry from the right has the same u and s: that is all that is read.
        """
        return directions(_side_by_side(map(_left_part, self.cores)))

    def rank(self) -> int:
        """Directions of the space they share: their joint column or row rank, the lesser."""
        below = _side_by_side(_left_part(_transposed(core)) for core in self.cores)
        return min(len(self.joint().s_r), len(directions(below).s_r))

    def lift(self, merged: Tensor | Directions) -> Held:
        """A merged core [p, q] as a change of the module, in fp32: balanced factors, or entries.

        Args:
            merged: Its entries, or its singular triplets where they are known: an SVD less.
        """
        if self.left_mp is None or self.right_nq is None:
            return (merged if isinstance(merged, Tensor) else merged.matrix()).float()
        # Only exact zeros go: the factors are the merged core, not an approximation of it.
        u_pr, s_r, v_rq = directions(merged, zero=1e-14) if isinstance(merged, Tensor) else merged
        return product_of(Directions(self.left_mp @ u_pr, s_r, v_rq @ self.right_nq.T))


def core_space(deltas: Sequence[Held]) -> CoreSpace:
    """The space of one module's task vectors: small for factors, the entries where any is dense.

    Args:
        deltas: One 2-D change per contribution, of one shape.
    """
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        return CoreSpace(tuple(d.dense() if isinstance(d, LowRank) else d for d in deltas))
    left_mp, cores, right_nq = factor_cores(factors)
    return CoreSpace(cores, left_mp, right_nq)


def factor_cores(factors: Sequence[LowRank]) -> tuple[Tensor, tuple[LowRank, ...], Tensor]:
    """Orthonormal Q [m, p] and P [n, q], and a core [p, q] for each product: B_i·A_i = Q·core_i·Pᵀ.

    O(K²(m + n)), fp64.
    """
    ranks = [part.rank for part in factors]
    left_mp, left_pK = torch.linalg.qr(torch.cat([part.b_mk for part in factors], dim=1).double())
    right_nq, right_qK = torch.linalg.qr(torch.cat([part.a_kn for part in factors]).double().T)
    pieces = zip(left_pK.split(ranks, dim=1), right_qK.split(ranks, dim=1), strict=True)
    return left_mp, tuple(LowRank(left_pk, right_qk.T) for left_pk, right_qk in pieces), right_nq


def directions(
    matrix: Held, count: int | None = None, *, zero: float = ZERO, of: float | None = None
) -> Directions:
    """The singular triplets of a matrix whose values are not zero.

    Args:
        matrix: Any matrix [p, q], as entries or a product; computed in fp64.
        count: Most triplets wanted; None takes all.
        zero: What counts as zero, as a share of ``of``.
        of: The size that zero is measured against; None takes the largest singular value.
    """
    if isinstance(matrix, LowRank):
        left_pk, (core,), right_qk = factor_cores([matrix])
        inner = directions(core.b_mk @ core.a_kn, count, zero=zero, of=of)
        return Directions(left_pk @ inner.u_pr, inner.s_r, inner.v_rq @ right_qk.T)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    floor = zero * (float(s[:1].sum()) if of is None else of)
    live = int((s > floor).sum())
    if count is None or live <= count:
        return Directions(u[:, :live], s[:live], v[:live])
    # Copies: views would keep all the others in memory.
    return Directions(u[:, :count].clone(), s[:count].clone(), v[:count].clone())


def product_of(found: Directions) -> LowRank:
    """Singular triplets as balanced factors in fp32, of rank one at least."""
    u_mr, s_r, v_rn = found
    if not len(s_r):
        return LowRank(
            u_mr.new_zeros(len(u_mr), 1).float(), v_rn.new_zeros(1, v_rn.shape[1]).float()
        )
    root_r = s_r.sqrt()
    return LowRank((u_mr * root_r).float(), (v_rn * root_r[:, None]).float())


def polar(matrix_pq: Tensor) -> Tensor:
    """The nearest partial isometry [p, q]: every singular value that is not zero becomes 1."""
    u_pr, _, v_rq = directions(matrix_pq)
    return u_pr @ v_rq


def _left_part(core: Held) -> Tensor:
    """A core less an isometry on its right [p, k], fp64."""
    if not isinstance(core, LowRank):
        return core.double()
    right_kk: Tensor = torch.linalg.qr(core.a_kn.T).R
    return core.b_mk @ right_kk.T


def _side_by_side(parts: Iterable[Tensor]) -> Tensor:
    """[part_1 | part_2 | …] less an isometry on its right, [p, 3p] at most while it is made.

    Full-rank cores of many contributions would otherwise stand in memory side by side in fp64.
    """
    stack: list[Tensor] = []
    for part_pk in parts:
        stack.append(part_pk)
        if len(stack) > 1 and sum(held.shape[1] for held in stack) > 2 * len(part_pk):
            reduced_pp: Tensor = torch.linalg.qr(torch.cat(stack, dim=1).T).R
            stack = [reduced_pp.T]
    return torch.cat(stack, dim=1)


def _transposed(core: Held) -> Held:
    return LowRank(core.a_kn.T, core.b_mk.T) if isinstance(core, LowRank) else core.T

"""The small space that holds a module's task vectors, and singular vectors that mean something.

QR of the stacked B and of the stacked Aᵀ turns every τ_i = B_i·A_i into a core of at most K x K.
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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.vectors.task_vector import Delta, LowRank

ZERO = 1e-6
"""Singular values up to this share of the largest count as zero. Task vectors are fp32: summing a
few products leaves noise of some 1e-7."""


class Directions(NamedTuple):
    """Singular triplets, largest first, in fp64: u [p, r], s [r], v [r, q]."""

    u_pr: Tensor
    s_r: Tensor
    v_rq: Tensor


@dataclass(frozen=True)
class CoreSpace:
    """Task vectors of one module in a space they share.

    Attributes:
        cores: One [p, q] per contribution: fp64 where they come from factors, else the entries.
        left_mp: Orthonormal basis of their columns [m, p]; None where the cores are the entries.
        right_nq: Orthonormal basis of their rows [n, q]; None where the cores are the entries.
    """

    cores: tuple[Tensor, ...]
    left_mp: Tensor | None = None
    right_nq: Tensor | None = None

    def total(self, weights_C: Tensor) -> Tensor:
        """Σ w_i core_i [p, q], fp64."""
        total_pq = torch.zeros_like(self.cores[0], dtype=torch.float64)
        for core_pq, weight in zip(self.cores, weights_C.tolist(), strict=True):
            total_pq.add_(core_pq, alpha=weight)
        return total_pq

    def lift(self, merged_pq: Tensor) -> Delta:
        """A merged core as a change of the module, in fp32: balanced factors, or entries."""
        if self.left_mp is None or self.right_nq is None:
            return merged_pq.float()
        # Only exact zeros go: the factors are the merged core, not an approximation of it.
        u_pr, s_r, v_rq = directions(merged_pq, zero=1e-14)
        if not len(s_r):
            return LowRank(self.left_mp[:, :1].float() * 0, self.right_nq[:, :1].T.float() * 0)
        root_r = s_r.sqrt()
        b_mr = self.left_mp @ (u_pr * root_r)
        a_rn = (v_rq * root_r[:, None]) @ self.right_nq.T
        return LowRank(b_mr.float(), a_rn.float())


def core_space(deltas: Sequence[Delta]) -> CoreSpace:
    """The space of one module's task vectors: small for factors, the entries where any is dense.

    Args:
        deltas: One 2-D change per contribution, of one shape.
    """
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        return CoreSpace(tuple(d.dense() if isinstance(d, LowRank) else d for d in deltas))
    left_mp, cores, right_nq = factor_cores(factors)
    return CoreSpace(cores, left_mp, right_nq)


def factor_cores(factors: Sequence[LowRank]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Orthonormal Q [m, p] and P [n, q], and a core [p, q] for each product: B_i·A_i = Q·core_i·Pᵀ.

    O(K²(m + n)), fp64.
    """
    ranks = [part.rank for part in factors]
    left_mp, left_pK = torch.linalg.qr(torch.cat([part.b_mk for part in factors], dim=1).double())
    right_nq, right_qK = torch.linalg.qr(torch.cat([part.a_kn for part in factors]).double().T)
    pieces = zip(left_pK.split(ranks, dim=1), right_qK.split(ranks, dim=1), strict=True)
    return left_mp, tuple(left_pk @ right_qk.T for left_pk, right_qk in pieces), right_nq


def directions(
    matrix_pq: Tensor, count: int | None = None, *, zero: float = ZERO, of: float | None = None
) -> Directions:
    """The singular triplets of a matrix whose values are not zero.

    Args:
        matrix_pq: Any matrix [p, q]; computed in fp64.
        count: Most triplets wanted; None takes all.
        zero: What counts as zero, as a share of ``of``.
        of: The size that zero is measured against; None takes the largest singular value.
    """
    u, s, v = torch.linalg.svd(matrix_pq.double(), full_matrices=False)
    floor = zero * (float(s[:1].sum()) if of is None else of)
    live = int((s > floor).sum())
    live = live if count is None else min(live, count)
    return Directions(u[:, :live], s[:live], v[:live])


def polar(matrix_pq: Tensor) -> Tensor:
    """The nearest partial isometry [p, q]: every singular value that is not zero becomes 1."""
    u_pr, _, v_rq = directions(matrix_pq)
    return u_pr @ v_rq

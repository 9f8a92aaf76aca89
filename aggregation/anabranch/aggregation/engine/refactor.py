"""Back to rank r: the best low-rank approximation of a merged ΔW, and how far off it is.

Shape legend: m rows, n columns, K stacked inner rank, k rank kept, l sketch width, R chunk rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.aggregation.core_space import factor_cores
from anabranch.vectors.counter import uniform
from anabranch.vectors.task_vector import LowRank

RowSource = Callable[[], Iterator[tuple[int, Tensor]]]
"""Yields a matrix in order as (index of the first row, rows [R, n]); can be called again."""

OVERSAMPLE = 10
ITERATIONS = 4
"""Subspace iterations. Each squares the ratio of singular values twice; merged entries have a flat
spectrum, where fewer leave a visible gap to the optimum."""


@dataclass(frozen=True)
class Spectrum:
    """The leading singular triplets of ΔW, in fp64.

    Attributes:
        u_mk: Left singular vectors [m, k].
        s_k: Singular values, largest first [k].
        v_kn: Right singular vectors [k, n].
        norm: ‖ΔW‖_F.
        residual: ‖ΔW − U S V‖_F.
    """

    u_mk: Tensor
    s_k: Tensor
    v_kn: Tensor
    norm: float
    residual: float


def low_rank_spectrum(delta: LowRank, rank: int) -> Spectrum:
    """Truncated SVD of a product of factors, exact to fp64.

    QR of B and of Aᵀ leaves a core of K x K at most, whose SVD is that of the product: the m x n
    matrix is never formed.

    Args:
        delta: The product.
        rank: Triplets wanted.
    """
    q_mK, (core,), p_nK = factor_cores([delta])
    u_KK, s_K, v_KK = torch.linalg.svd(core.b_mk @ core.a_kn, full_matrices=False)
    return Spectrum(
        q_mK @ u_KK[:, :rank],
        s_K[:rank],
        v_KK[:rank] @ p_nK.T,
        norm=float(s_K.norm()),
        residual=float(s_K[rank:].norm()),
    )


def streamed_spectrum(
    rows: RowSource, shape: tuple[int, int], rank: int, name: str, device: torch.device
) -> Spectrum:
    """Truncated SVD of a matrix that is read a chunk of rows at a time.

    Randomised subspace iteration (Halko, Martinsson and Tropp, 0909.4061), from the right: one read
    of the matrix is one step Z ← orth(Wᵀ(W Z)), a last one takes W Z. What is kept is W V Vᵀ with
    orthonormal V, so the residual is exact for the approximation returned,
    ‖W‖² − ‖W V‖², whether or not the iteration has converged. In fp64, since that is a difference.

    Args:
        rows: The matrix, read ``ITERATIONS + 1`` times.
        shape: m and n.
        rank: Triplets wanted.
        name: Names the seeded start.
        device: Where the rows live.
    """
    m, n = shape
    width = min(rank + OVERSAMPLE, m, n)
    z_nl = uniform(n * width, (0, f"sketch {name}", 0), device=device).sub_(0.5).view(n, width)
    z_nl = torch.linalg.qr(z_nl).Q
    for _ in range(ITERATIONS):
        next_nl = torch.zeros_like(z_nl)
        for _start, rows_Rn in rows():
            wide_Rn = rows_Rn.double()
            next_nl.addmm_(wide_Rn.T, wide_Rn @ z_nl)
        z_nl = torch.linalg.qr(next_nl).Q
    y_ml = torch.empty(m, width, dtype=torch.float64, device=device)
    squared_norm = 0.0
    for start, rows_Rn in rows():
        wide_Rn = rows_Rn.double()
        y_ml[start : start + len(wide_Rn)] = wide_Rn @ z_nl
        squared_norm += float(wide_Rn.square().sum())
    q_ml, core_ll = torch.linalg.qr(y_ml)
    u_ll, s_l, v_ll = torch.linalg.svd(core_ll, full_matrices=False)
    s_k = s_l[:rank]
    return Spectrum(
        q_ml @ u_ll[:, :rank],
        s_k,
        v_ll[:rank] @ z_nl.T,
        norm=math.sqrt(squared_norm),
        residual=math.sqrt(max(0.0, squared_norm - float(s_k.square().sum()))),
    )


def matrix_rows(matrix_mn: Tensor) -> RowSource:
    """A matrix in memory as a source of rows, in pieces whose fp64 copy stays small."""
    step = max(1, (1 << 22) // max(1, matrix_mn.shape[1]))

    def rows() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(matrix_mn), step):
            yield start, matrix_mn[start : start + step]

    return rows

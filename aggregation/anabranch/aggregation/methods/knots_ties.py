"""KnOTS-TIES: TIES in the basis the task vectors share (Stoica et al., 2410.19735).

Shape legend: C contributions, m rows, n columns, p and q rows and columns of a core, r directions
of the joint SVD, D = r·n entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.core_space import core_space
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.vectors.task_vector import Held, LowRank


class KnotsTiesConfig(MethodConfig):
    """Parameters of KnOTS-TIES."""

    density: float = Field(0.2, gt=0, le=1)
    """Fraction of entries kept per task vector in the shared basis, by magnitude."""


def knots_ties(deltas: Sequence[Held], weights_C: Tensor, config: KnotsTiesConfig) -> Held:
    """U·TIES(Z_1 … Z_C), where [τ_1 | … | τ_C] = U·[Z_1 | … | Z_C] is a joint SVD.

    TIES is ours: weighted election, one density per module. With a linear merge in its place the
    basis drops out, U·Σ w_i Z_i = Σ w_i τ_i. The Z_i are C·r·n entries with r ≤ Σ r_i, the most any
    method of this kind holds at once.

    Args:
        deltas: One change [m, n] per contribution.
        weights_C: Weight per contribution [C], positive.
        config: The density.

    Returns:
        The merged change [m, n]: factors of rank Σ r_i at most where all inputs are factors.
    """
    basis_mr, z_Crn = shared_basis(deltas)
    merged_D = TIES(z_Crn.flatten(1), weights_C, TiesConfig(density=config.density))
    merged_rn = merged_D.view(z_Crn.shape[1:])
    if all(isinstance(delta, LowRank) for delta in deltas):
        return LowRank(basis_mr.float(), merged_rn)
    return basis_mr.float() @ merged_rn


def shared_basis(deltas: Sequence[Held]) -> tuple[Tensor, Tensor]:
    """Task vectors in the left singular vectors of all of them side by side.

    diag(s)·V_i of the joint SVD is Uᵀ·τ_i. Values up to ``core_space.ZERO`` of the largest count as
    zero (the authors' code: up to 1e-5, whatever the scale).

    Args:
        deltas: One change [m, n] per contribution.

    Returns:
        U [m, r] in fp64, one direction at least, and the Z_i = Uᵀ·τ_i [C, r, n] in fp32.
    """
    space = core_space(deltas)
    u_pr = space.joint().u_pr
    if not u_pr.shape[1]:
        u_pr = torch.eye(len(u_pr), 1, dtype=u_pr.dtype, device=u_pr.device)
    right_nq = space.right_nq
    columns = deltas[0].shape[1]
    z_Crn = torch.empty(len(deltas), u_pr.shape[1], columns, device=u_pr.device)
    for core, z_rn in zip(space.cores, z_Crn, strict=True):
        if isinstance(core, LowRank):
            z_rq = (u_pr.T @ core.b_mk) @ core.a_kn
        else:
            z_rq = u_pr.T @ core.double()
        z_rn.copy_(z_rq if right_nq is None else z_rq @ right_nq.T)
    return u_pr if space.left_mp is None else space.left_mp @ u_pr, z_Crn


KNOTS_TIES = MergeMethod(
    name="knots_ties",
    config=KnotsTiesConfig,
    scope="tensor",
    matrices=knots_ties,
    matrix_copies=5,
)

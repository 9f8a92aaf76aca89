"""From singular vectors to LoRA factors that training can go on from.

A product B·A has many factorisations. The one chosen is balanced, turned towards the round's start,
and has no dead direction.

Shape legend: m rows, n columns, k directions of ΔW, r rank of the factors (r ≥ k).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anabranch.aggregation.engine.refactor import Spectrum
from anabranch.vectors.adapter import LoraFactors
from anabranch.vectors.counter import uniform


def balanced_factors(
    spectrum: Spectrum,
    rank: int,
    like: LoraFactors,
    *,
    name: str,
    start: LoraFactors | None = None,
    align: bool = True,
) -> LoraFactors:
    """Factors of rank r with ΔW = scaling·B·A: B = U√(S/scaling), A = √(S/scaling)·V.

    Where ΔW has fewer than r directions, a zero column of B beside a zero row of A would stay zero
    for ever: both gradients vanish. Such columns of B stay zero, the rows of A come from the start
    (or a seeded draw), as at the beginning of a LoRA training. ΔW does not change.

    Args:
        spectrum: ΔW, with at most r directions.
        rank: r.
        like: Gives scaling, rsLoRA and dtype.
        name: The module, which names the seeded draw.
        start: The round's start, if there is one.
        align: Whether to turn the factors towards the start, if it has rank r.

    Raises:
        ValueError: A scaling that is not positive.
    """
    if not like.scaling > 0:
        raise ValueError(f"module {name}: alpha is {like.alpha}; merge adapters with alpha > 0")
    m, n = len(spectrum.u_mk), spectrum.v_kn.shape[1]
    # A direction below fp32's resolution of the largest is rounding, and counts as none.
    smallest = float(spectrum.s_k[:1].sum()) * torch.finfo(torch.float32).eps
    live = int((spectrum.s_k > smallest).sum())
    root_k = (spectrum.s_k[:live] / like.scaling).sqrt()
    b_mr = spectrum.u_mk.new_zeros(m, rank)
    a_rn = spectrum.u_mk.new_zeros(rank, n)
    b_mr[:, :live] = spectrum.u_mk[:, :live] * root_k
    a_rn[:live] = spectrum.v_kn[:live] * root_k[:, None]
    if start is not None and start.rank == rank:
        a_start_rn = start.a_rn.to(a_rn)
        turn_rr = rotation(b_mr, a_rn, start.b_mr.to(b_mr), a_start_rn)
        a_rn[live:] = (turn_rr.T @ a_start_rn)[live:]
        if align:
            b_mr, a_rn = b_mr @ turn_rr.T, turn_rr @ a_rn
    elif live < rank:
        bound = 1 / math.sqrt(n)
        draw_D = uniform((rank - live) * n, (0, f"lora_A {name}", 0), device=a_rn.device)
        a_rn[live:] = draw_D.mul_(2 * bound).sub_(bound).view(-1, n)
    return LoraFactors(
        a_rn.to(like.a_rn.dtype).contiguous(),
        b_mr.to(like.b_mr.dtype).contiguous(),
        like.alpha_at(rank),
        like.rslora,
    )


def rotation(b_mr: Tensor, a_rn: Tensor, b_start_mr: Tensor, a_start_rn: Tensor) -> Tensor:
    """Orthogonal R [r, r] that minimises ‖R·A − A_s‖² + ‖B·Rᵀ − B_s‖² (Schönemann, 1966).

    B·Rᵀ·R·A is B·A, so factors may be turned freely.

    Args:
        b_mr: B to turn.
        a_rn: A to turn.
        b_start_mr: B to turn it towards.
        a_start_rn: A to turn it towards.
    """
    u_rr, _, v_rr = torch.linalg.svd(a_start_rn @ a_rn.T + b_start_mr.T @ b_mr)
    turn_rr: Tensor = u_rr @ v_rr
    return turn_rr

"""Iso-CTS: isotropic merging in common and task-specific subspaces (Marczak et al., 2502.04959).

Shape legend: C contributions, m rows, n columns, p and q rows and columns of a core, K directions
kept in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.core_space import Directions, core_space, directions, polar
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.iso_c import flattened
from anabranch.vectors.task_vector import Held, LowRank, norm


class IsoCtsConfig(MethodConfig):
    """Parameters of Iso-CTS. λ is the recipe's ``scale``, on a *sum* of task vectors."""

    common: float = Field(0.8, ge=0, le=1)
    """Share of the directions that the sum of all task vectors fills; what each adds outside of
    them shares the rest."""
    rank: int | None = Field(None, ge=1)
    """Directions kept in all; None keeps as many as there are. Going back to rank r afterwards can
    only pick among equals, so give r here, or keep all by ``refactor.kind = "stack"``."""


def iso_cts(deltas: Sequence[Held], weights_C: Tensor, config: IsoCtsConfig) -> Held:
    """The leading directions of the sum, and beside them those of each task vector's remainder.

    Of d directions, about ``common``·d are the sum's; the others go in equal number to the parts of
    the w_i τ_i that lie outside them. All are made orthogonal (polar factors) and weigh the mean of
    their singular values.

    On task vectors of full rank d = min(m, n) and this is the paper. d is here the rank of the
    space the task vectors share (C·r for adapters of rank r in general position), and directions
    whose value is zero do not count: see ``core_space``. With few directions for each contribution
    the rounding may leave none but the common ones, which is Iso-C.

    Args:
        deltas: One change [m, n] per contribution.
        weights_C: Weight per contribution [C], positive, 1 on average.
        config: How much is common, and how much is kept.

    Returns:
        The merged change [m, n]: factors where all inputs are factors.
    """
    space = core_space(deltas)
    whole = directions(space.total(weights_C))
    rank = min(space.cores[0].shape)
    if len(whole.s_r) < rank:
        rank = space.rank()
    rank = rank if config.rank is None else min(rank, config.rank)
    common, specific = split(rank, len(deltas), config.common)
    basis_pr = whole.u_pr[:, :common]
    parts = [Directions(basis_pr, whole.s_r[:common], whole.v_rq[:common])]
    for core, weight in zip(space.cores, weights_C.tolist(), strict=True):
        # Zero is measured on the whole: what a projection leaves of nothing is rounding.
        size = weight * norm(core)
        parts.append(directions(_outside(core, basis_pr, weight), specific, of=size))
    u_pK = polar(torch.cat([part.u_pr for part in parts], dim=1))
    v_Kq = polar(torch.cat([part.v_rq for part in parts]))
    together = Directions(u_pK, torch.cat([part.s_r for part in parts]), v_Kq)
    # Polar factors of fewer directions than columns are no triplets: lift finds them.
    return space.lift(flattened(together).matrix())


def _outside(core: Held, basis_pr: Tensor, weight: float) -> Held:
    """w·core less its part in a subspace of columns, fp64."""
    columns = core.b_mk if isinstance(core, LowRank) else core.double()
    rest = (columns - basis_pr @ (basis_pr.T @ columns)) * weight
    return LowRank(rest, core.a_kn) if isinstance(core, LowRank) else rest


def split(rank: int, count: int, share: float) -> tuple[int, int]:
    """Common directions, and those of each contribution: together ``rank``.

    Rounded as the authors' code rounds: the common part gives or takes what makes the rest divide
    by the number of contributions.
    """
    specific = min(round((rank - int(rank * share)) / count), rank // count)
    return rank - specific * count, specific


ISO_CTS = MergeMethod(name="iso_cts", config=IsoCtsConfig, scope="tensor", matrices=iso_cts)

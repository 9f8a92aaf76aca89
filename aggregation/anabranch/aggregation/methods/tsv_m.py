"""TSV-M: merge task singular vectors, made orthogonal first (Gargiulo et al., 2412.00081).

Shape legend: C contributions, m rows, n columns, p and q rows and columns of a core, k directions
kept of one task vector, K of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.core_space import core_space, directions, polar
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.vectors.task_vector import Held


class TsvMConfig(MethodConfig):
    """Parameters of TSV-M. The paper's α is the recipe's ``scale``."""

    rank: int | None = Field(None, ge=1)
    """Singular directions kept of each task vector; None takes the paper's ⌊min(m, n) / C⌋, which
    is all of an adapter's while C·r fits the matrix."""


def tsv_m(deltas: Sequence[Held], weights_C: Tensor, config: TsvMConfig) -> Held:
    """U⊥·diag(w_i s_i)·V⊥: the leading directions of all task vectors, decorrelated.

    U and V hold the k leading singular vectors of each task vector side by side; ⊥ takes their
    polar factors, the nearest sets without interference. Equal task vectors merge to themselves
    (their k directions), orthogonal ones to their sum.

    On task vectors of full rank this is the paper. Of those of lower rank, which LoRA's are, the
    paper's ⌊min(m, n) / C⌋ vectors reach into directions whose value is zero; here only those above
    zero are stacked (``core_space``), and the polar factor is taken over the rank of the stack.

    Args:
        deltas: One change [m, n] per contribution.
        weights_C: Weight per contribution [C], positive, 1 on average.
        config: How many directions to keep.

    Returns:
        The merged change [m, n]: factors of rank Σ k_i at most where all inputs are factors.
    """
    space = core_space(deltas)
    kept = config.rank or max(1, min(deltas[0].shape) // len(deltas))
    parts = [directions(core, kept) for core in space.cores]
    u_pK = polar(torch.cat([part.u_pr for part in parts], dim=1))
    v_Kq = polar(torch.cat([part.v_rq for part in parts]))
    s_K = torch.cat([w * part.s_r for w, part in zip(weights_C.tolist(), parts, strict=True)])
    return space.lift((u_pK * s_K) @ v_Kq)


TSV_M = MergeMethod(name="tsv_m", config=TsvMConfig, scope="tensor", matrices=tsv_m)

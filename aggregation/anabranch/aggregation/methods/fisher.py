"""Fisher merging: each entry's mean, weighted by how sure each model is of it (2111.09832).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.vectors.importance import Over


class FisherConfig(MethodConfig):
    """Parameters of Fisher merging."""

    epsilon: float = Field(1e-6, gt=0)
    """Added to every entry of the Fisher: what no model is sure of gets the plain mean."""
    normalise: Over = "model"
    """Over what each contribution's Fisher is brought to a mean of 1, so that none outweighs the
    others by its scale: ``model`` (as the paper's code), ``module``, which also keeps it from
    staking everything on one module, or ``none``, for contributions that are trusted."""


def fisher(
    deltas_CD: Tensor, weights_C: Tensor, config: FisherConfig, *, importances_CD: Tensor
) -> Tensor:
    """Σ w (F + ε) τ / Σ w (F + ε).

    On task vectors it is what it is on parameters: a mean moves with its origin. In fp64, where
    neither a huge nor a tiny F leaves the range.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], of any positive sum.
        config: ε.
        importances_CD: Diagonal Fisher of each [C, D], zero or more.

    Returns:
        Merged entries [D], each between the least and the greatest of its column.
    """
    total_D = torch.zeros_like(deltas_CD[0], dtype=torch.float64)
    share_D = torch.zeros_like(total_D)
    shares_C = weights_C / weights_C.sum()
    for delta_D, importance_D, share in zip(
        deltas_CD, importances_CD, shares_C.tolist(), strict=True
    ):
        part_D = importance_D.double().add_(config.epsilon).mul_(share)
        share_D.add_(part_D)
        total_D.add_(part_D.mul_(delta_D))
    return total_D.div_(share_D).float()


FISHER = MergeMethod(
    name="fisher", config=FisherConfig, scope="entry", merge=fisher, needs_importance=True
)

"""Equal norms: only the direction of a task vector has a say.

Shape legend: C contributions.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.robust.pre import PreAggregator, norms


class UnitNormConfig(MethodConfig):
    """Parameters of equal norms."""

    norm: float | None = Field(None, gt=0)
    """Everybody's norm; None takes the median of the cohort's."""


def unit_norm(gram_CC: Tensor, config: UnitNormConfig) -> Tensor:
    """Scales every task vector to one norm, up or down; one that is zero stays zero.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: The norm.

    Returns:
        The map [C, C], fp64.
    """
    norms_C = norms(gram_CC)
    wanted = float(norms_C.median()) if config.norm is None else config.norm
    return torch.diag(torch.where(norms_C > 0, wanted / norms_C, 0.0))


UNIT_NORM = PreAggregator("unit_norm", UnitNormConfig, unit_norm)

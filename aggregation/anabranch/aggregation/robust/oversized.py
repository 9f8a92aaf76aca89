"""What is far longer than its cohort has no say: the mean of the others stands in its place.

Shape legend: C contributions.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.robust.pre import PreAggregator, norms


class OversizedConfig(MethodConfig):
    """Parameters of leaving the oversized out."""

    factor: float = Field(2.0, gt=1)
    """How many times the cohort's median norm is too long."""


def oversized(gram_CC: Tensor, config: OversizedConfig) -> Tensor:
    """Puts the mean of the others in the place of every task vector that is too long.

    Clipping leaves an attacker's direction at an honest length. Whoever sends several times what
    the others do is not one of them: fewer than half can be, since it is the median that they
    exceed. Their places are filled and not dropped, so that steps and methods after this one still
    find as many as they were told of; a mean is then that of the others.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: What is too long, beside the median of those that send anything.

    Returns:
        The map [C, C], fp64.
    """
    norms_C = norms(gram_CC)
    sent_C = norms_C[norms_C > 0]
    most = config.factor * float(sent_C.median()) if len(sent_C) else 0.0
    kept_C = norms_C <= most
    mix_CC = torch.eye(len(norms_C), dtype=torch.float64)
    mix_CC[~kept_C] = kept_C.double() / kept_C.sum()
    return mix_CC


OVERSIZED = PreAggregator("oversized", OversizedConfig, oversized)

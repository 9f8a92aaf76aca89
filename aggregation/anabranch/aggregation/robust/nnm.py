"""Nearest-neighbour mixing (Allouah et al., AISTATS 2023, 2302.01772).

Shape legend: C contributions.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig, squared_distances
from anabranch.aggregation.robust.arc import check_minority
from anabranch.aggregation.robust.pre import PreAggregator


class NnmConfig(MethodConfig):
    """Parameters of nearest-neighbour mixing."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""


def nnm(gram_CC: Tensor, config: NnmConfig) -> Tensor:
    """Replaces every task vector by the mean of its C − f nearest, itself among them.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: f.

    Returns:
        The map [C, C], fp64; of equal distances the earlier contribution is the nearer.

    Raises:
        ValueError: f is not below half of the contributions.
    """
    count = len(gram_CC)
    check_minority("nnm", config.f, count)
    near_CN = squared_distances(gram_CC).argsort(dim=1, stable=True)[:, : count - config.f]
    return torch.zeros_like(gram_CC).scatter_(1, near_CN, 1 / (count - config.f))


NNM = PreAggregator("nnm", NnmConfig, nnm)

"""Karcher mean: the point of the sphere with the least squared arcs to the unit task vectors.

Riemannian centre of mass (Karcher, 1977), as mergekit's ``karcher`` (2603.04972) has it.

Shape legend: C contributions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, cosines


class KarcherConfig(MethodConfig):
    """Parameters of the Karcher mean."""

    iterations: int = Field(10, ge=1)
    """Most tangent means. They cost C² each, whatever the size of the model."""
    tolerance: float = Field(1e-5, gt=0)
    """Arcs, in radians, and lengths of means of unit vectors that count as none."""
    scope: Literal["tensor", "model"] = "tensor"
    """What directions and lengths are of: each module apart, or the whole model."""


def karcher_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: KarcherConfig
) -> Tensor:
    """The mean direction on the sphere, at the weighted mean length, as Σ c_i·τ_i.

    The mean is Σ a_i u_i throughout, so ⟨u_i, mean⟩ = (Ka)_i with the cosines K, and every step
    runs in C numbers. It starts at the normalised mean of the unit vectors, or at the first of them
    where they cancel. A contribution opposite to the mean has no one arc to it and sits that step
    out, one that is zero has no direction at all (mergekit leaves out lengths up to 1e-5, which
    real task vectors have).

    Args:
        weights_C: Weight per contribution [C], zero or more.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: When to stop.

    Returns:
        Coefficients [C], fp64.
    """
    assert gram_CC is not None
    lengths_C = gram_CC.diagonal().clamp(min=0).sqrt()
    cosine_CC = cosines(gram_CC)
    shares_C = weights_C / weights_C.sum()
    pulls_C = torch.where(lengths_C > 0, shares_C, 0.0)
    if not pulls_C.any():
        return shares_C
    pulls_C = pulls_C / pulls_C.sum()

    def length(mean_C: Tensor) -> float:
        return float((mean_C @ cosine_CC @ mean_C).clamp(min=0).sqrt())

    mean_C = pulls_C
    if length(mean_C) < config.tolerance:
        first = int(pulls_C.nonzero()[0])
        mean_C = torch.zeros_like(pulls_C).index_fill_(0, torch.tensor([first]), 1.0)
    mean_C = mean_C / length(mean_C)
    for _ in range(config.iterations):
        dots_C = (cosine_CC @ mean_C).clamp(-1, 1)
        arcs_C = dots_C.arccos()
        reached_C = arcs_C.sin() < config.tolerance
        steps_C = torch.where(reached_C, 0.0, pulls_C * arcs_C / arcs_C.sin())
        tangent_C = steps_C - (steps_C @ dots_C) * mean_C
        arc = length(tangent_C)
        if arc < config.tolerance:
            break
        mean_C = math.cos(arc) * mean_C + math.sin(arc) / arc * tangent_C
        mean_C = mean_C / length(mean_C)
    return torch.where(lengths_C > 0, mean_C / lengths_C, 0.0) * (shares_C @ lengths_C)


KARCHER = MergeMethod(
    name="karcher",
    config=KarcherConfig,
    scope="tensor",
    coefficients=karcher_coefficients,
    needs_gram=True,
)

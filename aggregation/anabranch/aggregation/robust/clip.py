"""Norm clipping, to a fixed norm or to the cohort's median (Sun et al., 1911.07963).

Shape legend: C contributions.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.robust.pre import PreAggregator, norms, scaled_down


class ClipConfig(MethodConfig):
    """Parameters of norm clipping."""

    norm: float | None = Field(None, gt=0)
    """Largest norm; None takes the median of the cohort's."""


def clip(gram_CC: Tensor, config: ClipConfig) -> Tensor:
    """Scales every task vector down to the largest norm allowed; none up.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: The norm.

    Returns:
        The map [C, C], fp64.
    """
    norms_C = norms(gram_CC)
    return scaled_down(norms_C, float(norms_C.median()) if config.norm is None else config.norm)


CLIP = PreAggregator("clip", ClipConfig, clip)

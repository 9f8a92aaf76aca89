"""Adaptive robust clipping (Allouah et al., 2405.14432).

Shape legend: C contributions.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.robust.pre import PreAggregator, norms, scaled_down


class ArcConfig(MethodConfig):
    """Parameters of ARC."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""


def arc(gram_CC: Tensor, config: ArcConfig) -> Tensor:
    """Clips the ⌊2f(C − f)/C⌋ largest task vectors to the largest norm among the others.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: f.

    Returns:
        The map [C, C], fp64.

    Raises:
        ValueError: f is not below half of the contributions.
    """
    count = len(gram_CC)
    check_minority("arc", config.f, count)
    norms_C = norms(gram_CC)
    clipped = 2 * config.f * (count - config.f) // count
    return scaled_down(norms_C, float(norms_C.sort().values[count - clipped - 1]))


def check_minority(name: str, f: int, count: int) -> None:
    """Refuse as many malicious contributions as honest ones.

    Raises:
        ValueError: It is so.
    """
    if 2 * f >= count:
        raise ValueError(
            f"{name}: f: {f} malicious of {count} are no minority; lower f or wait for more"
        )


ARC = PreAggregator("arc", ArcConfig, arc)

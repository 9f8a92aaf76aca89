"""SLERP: from one task vector to another along the arc between them (Shoemake, SIGGRAPH 1985).

Shape legend: C contributions, here two.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, cosines

_STRAIGHT = 0.9995
"""Beyond this |cosine| the arc is a straight line, or has no one direction."""


class SlerpConfig(MethodConfig):
    """Parameters of SLERP."""

    t: float = Field(0.5, ge=0, le=1)
    """How far to go from the first contribution (0) to the second (1)."""
    scope: Literal["tensor", "model"] = "tensor"
    """What the angle is measured over: each module apart, or the whole model."""


def slerp_coefficients(weights_C: Tensor, gram_CC: Tensor | None, config: SlerpConfig) -> Tensor:
    """sin((1 − t)θ)/sin θ and sin(tθ)/sin θ, or 1 − t and t where |cos θ| > .9995.

    They go onto the task vectors as they are, not onto unit vectors, as in mergekit. Weights are
    ignored: t takes their place.

    Args:
        weights_C: Not read.
        gram_CC: Inner products of the task vectors [2, 2], fp64.
        config: t.

    Returns:
        Coefficients [2], fp64.

    Raises:
        ValueError: Not two contributions.
    """
    assert gram_CC is not None
    if len(gram_CC) != 2:
        raise ValueError(
            f"slerp: goes between two contributions, there are {len(gram_CC)}; "
            "take karcher or multi_slerp for another number"
        )
    cosine = float(cosines(gram_CC)[0, 1])
    if abs(cosine) > _STRAIGHT:
        return weights_C.new_tensor([1 - config.t, config.t])
    angle = math.acos(cosine)
    arcs = [math.sin((1 - config.t) * angle), math.sin(config.t * angle)]
    return weights_C.new_tensor(arcs) / math.sin(angle)


SLERP = MergeMethod(
    name="slerp",
    config=SlerpConfig,
    scope="tensor",
    coefficients=slerp_coefficients,
    needs_gram=True,
)

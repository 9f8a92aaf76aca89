"""Multi-SLERP: the mean direction at the mean length (mergekit's ``multislerp``).

mergekit projects unit vectors u_i onto the tangent space at their normalised weighted mean m,
averages there and maps back. That average is Σ w_i(u_i − ⟨u_i, m⟩m) = |Σ w u|·m − |Σ w u|·m = 0,
whatever the vectors: what comes back is m itself, and the rest is rounding.

Shape legend: C contributions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, cosines

_OPPOSED = 1e-7
"""A mean of unit vectors shorter than this is rounding, and has no direction."""


class MultiSlerpConfig(MethodConfig):
    """Parameters of Multi-SLERP."""

    scope: Literal["tensor", "model"] = "tensor"
    """What directions and lengths are of: each module apart, or the whole model."""


def multi_slerp_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: MultiSlerpConfig
) -> Tensor:
    """c_i = (Σ w|τ|)·(w_i/|τ_i|)/|Σ w u|, u_i the unit vectors and Σ w = 1.

    Where the unit vectors cancel there is no direction: then it is the weighted mean, as mergekit
    has it for two (for more it raises).

    Args:
        weights_C: Weight per contribution [C], zero or more.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: Not read: ``scope`` matters to the engine only.

    Returns:
        Coefficients [C], fp64.
    """
    assert gram_CC is not None
    shares_C = weights_C / weights_C.sum()
    lengths_C = gram_CC.diagonal().clamp(min=0).sqrt()
    length = (shares_C @ cosines(gram_CC) @ shares_C).clamp(min=0).sqrt()
    if float(length) < _OPPOSED:
        return shares_C
    units_C = torch.where(lengths_C > 0, shares_C / lengths_C, 0.0)
    return units_C * (shares_C @ lengths_C / length)


MULTI_SLERP = MergeMethod(
    name="multi_slerp",
    config=MultiSlerpConfig,
    scope="tensor",
    coefficients=multi_slerp_coefficients,
    needs_gram=True,
)

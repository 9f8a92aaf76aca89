"""Centred clipping (Karimireddy et al., ICML 2021, 2012.10333).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine, inner_products


class CentredClippingConfig(MethodConfig):
    """Parameters of centred clipping."""

    tau: float | None = Field(None, gt=0)
    """Largest distance from the centre that counts whole; None takes the cohort's median, afresh in
    each step."""
    steps: int = Field(3, ge=1)
    """Steps of the centre."""


def centred_clipping_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: CentredClippingConfig
) -> Tensor:
    """Coefficients of the centre v ← v + mean of (τ_i − v)·min(1, tau/‖τ_i − v‖), from v = 0.

    The centre starts where the round did: a task vector is a change against it. v is always a
    sum of the contributions, so distances follow from their Gram matrix.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: tau and steps.

    Returns:
        Coefficients [C], fp64, which sum to at most 1.
    """
    assert gram_CC is not None
    count = len(gram_CC)
    centre_C = torch.zeros(count, dtype=torch.float64)
    for _ in range(config.steps):
        towards_C = gram_CC @ centre_C
        squares_C = gram_CC.diagonal() - 2 * towards_C + centre_C @ towards_C
        radii_C = squares_C.clamp(min=0).sqrt()
        tau = float(radii_C.median()) if config.tau is None else config.tau
        shares_C = torch.where(radii_C > tau, tau / radii_C, 1.0) / count
        centre_C = centre_C * (1 - shares_C.sum()) + shares_C
    return centre_C


def centred_clipping(
    deltas_CD: Tensor,
    weights_C: Tensor | None = None,
    config: CentredClippingConfig | None = None,
) -> Tensor:
    """A mean in which nobody pulls the centre further than tau over C.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: tau and steps; None takes the defaults.

    Returns:
        Merged entries [D].
    """
    config = config or CentredClippingConfig()
    gram_CC = inner_products(deltas_CD)
    return combine(deltas_CD, centred_clipping_coefficients(gram_CC[0], gram_CC, config))


CENTRED_CLIPPING = MergeMethod(
    name="centred_clipping",
    config=CentredClippingConfig,
    scope="model",
    coefficients=centred_clipping_coefficients,
    needs_gram=True,
)

"""Geometric median by the smoothed Weiszfeld iteration (RFA: Pillutla et al., 1912.13445).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import (
    MergeMethod,
    MethodConfig,
    combine,
    inner_products,
    squared_distances,
)


class GeometricMedianConfig(MethodConfig):
    """Parameters of the geometric median."""

    nu: float = Field(1e-6, gt=0)
    """Smoothing ν: distances below it count as ν. In the unit of the task vectors' norm."""
    iterations: int = Field(100, ge=1)
    """Most Weiszfeld steps. They cost C² each, whatever the size of the model."""
    tolerance: float = Field(1e-9, ge=0)
    """Stop once no coefficient moves by more than this."""


def geometric_median_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: GeometricMedianConfig
) -> Tensor:
    """Coefficients, summing to 1, of the point with the least sum of distances.

    With z = Σ c_j τ_j, ‖τ_i − z‖² = G_ii − 2(Gc)_i + cᵀGc for the Gram matrix G, so the iteration
    runs in C x C numbers. A huge outlier has a coefficient as small as it is huge, and so no term
    that is large: of squared distances, which cancel, it would decide the digits. The iteration
    starts near the contributions whose median distance to the others is small: from the plain mean,
    one huge outlier would cost steps and digits. Weights are ignored: a client states its own.

    Args:
        weights_C: Not read.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: Smoothing, and when to stop.

    Returns:
        Coefficients [C], fp64.
    """
    assert gram_CC is not None
    squared_CC = squared_distances(gram_CC)
    coefficients_C = 1 / squared_CC.median(dim=1).values.sqrt().clamp(min=config.nu)
    coefficients_C /= coefficients_C.sum()
    for _ in range(config.iterations):
        towards_C = gram_CC @ coefficients_C
        squares_C = gram_CC.diagonal() - 2 * towards_C + coefficients_C @ towards_C
        radii_C = squares_C.clamp(min=0).sqrt()
        next_C = 1 / radii_C.clamp(min=config.nu)
        next_C /= next_C.sum()
        moved = float((next_C - coefficients_C).abs().max())
        coefficients_C = next_C
        if moved <= config.tolerance:
            break
    return coefficients_C


def geometric_median(
    deltas_CD: Tensor,
    weights_C: Tensor | None = None,
    config: GeometricMedianConfig | None = None,
) -> Tensor:
    """The point with the least sum of Euclidean distances to the task vectors.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: Smoothing, and when to stop; None takes the defaults.

    Returns:
        Merged entries [D].
    """
    config = config or GeometricMedianConfig()
    gram_CC = inner_products(deltas_CD)
    return combine(deltas_CD, geometric_median_coefficients(gram_CC[0], gram_CC, config))


GEOMETRIC_MEDIAN = MergeMethod(
    name="geometric_median",
    config=GeometricMedianConfig,
    scope="model",
    coefficients=geometric_median_coefficients,
    needs_gram=True,
)

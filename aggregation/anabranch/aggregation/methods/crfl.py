"""CRFL: a mean that is clipped and smoothed (Xie et al., ICML 2021, 2106.08283).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine, inner_products
from anabranch.aggregation.robust.noise import with_noise
from anabranch.aggregation.robust.pre import norms


class CrflConfig(MethodConfig):
    """Parameters of CRFL's merge."""

    norm: float | None = Field(None, gt=0)
    """Largest norm of the merged change (ρ in the paper); None takes the median of the cohort's."""
    sigma: float = Field(0.01, ge=0)
    """Standard deviation of the Gaussian noise on every entry, in their unit; 0 only clips. With
    noise the result is entries, so an adapter's goes back by an SVD."""
    seed: int = Field(0, ge=0)
    """Of the noise; another one in each round. Who knows it can take the noise off again."""


def crfl_coefficients(weights_C: Tensor, gram_CC: Tensor | None, config: CrflConfig) -> Tensor:
    """Coefficients of the weighted mean, scaled down to the norm.

    The paper clips the whole model; here it is the change against what all started from. Its
    certificate also needs many noisy copies of the model when it predicts, which a merge has no
    part in.

    Args:
        weights_C: Weight per contribution [C].
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: The norm.

    Returns:
        Coefficients [C], fp64.
    """
    assert gram_CC is not None
    most = float(norms(gram_CC).median()) if config.norm is None else config.norm
    mean_C = weights_C / weights_C.sum()
    norm = float((mean_C @ gram_CC @ mean_C).clamp(min=0).sqrt())
    return mean_C * (most / norm) if norm > most else mean_C


def crfl(deltas_CD: Tensor, weights_C: Tensor, config: CrflConfig | None = None) -> Tensor:
    """The weighted mean, clipped, without noise.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C].
        config: The norm; None takes the default.

    Returns:
        Merged entries [D].
    """
    coefficients_C = crfl_coefficients(weights_C, inner_products(deltas_CD), config or CrflConfig())
    return combine(deltas_CD, coefficients_C)


def _deviation(gram_CC: Tensor, config: CrflConfig) -> float:
    return config.sigma


_WITHOUT_NOISE = MergeMethod(
    name="crfl", config=CrflConfig, scope="model", coefficients=crfl_coefficients, needs_gram=True
)
_WITH_NOISE = with_noise(_WITHOUT_NOISE, _deviation)

CRFL = replace(_WITHOUT_NOISE, form=lambda config: _WITH_NOISE if config.sigma else None)

"""Weighted mean: FedAvg on task vectors (McMahan et al., 1602.05629).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine


class MeanConfig(MethodConfig):
    """No parameters: the weights say everything."""


def mean_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None = None, config: MeanConfig | None = None
) -> Tensor:
    """w_i / Σw [C].

    Args:
        weights_C: Weight per contribution [C], of any positive sum.
        gram_CC: Not read.
        config: Not read.
    """
    return weights_C / weights_C.sum()


def mean(deltas_CD: Tensor, weights_C: Tensor, config: MeanConfig | None = None) -> Tensor:
    """Σ w_i τ_i / Σ w_i.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], of any positive sum.
        config: Not read.

    Returns:
        Merged entries [D].
    """
    return combine(deltas_CD, mean_coefficients(weights_C))


MEAN = MergeMethod(name="mean", config=MeanConfig, scope="entry", coefficients=mean_coefficients)

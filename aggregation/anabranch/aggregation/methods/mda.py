"""Minimum-diameter averaging (Rousseeuw 1985; El Mhamdi et al., 1802.07927).

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
from anabranch.aggregation.robust.subsets import best_subset


class MdaConfig(MethodConfig):
    """Parameters of minimum-diameter averaging."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand; the cost is that of all subsets without f."""


def mda_coefficients(weights_C: Tensor, gram_CC: Tensor | None, config: MdaConfig) -> Tensor:
    """1/(C − f) for the C − f contributions whose largest distance is least.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: f.

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: f is not below half of the contributions, or there are too many subsets.
    """
    assert gram_CC is not None
    distances = squared_distances(gram_CC).numpy()

    def diameter(subset: list[int]) -> float:
        return float(distances[subset][:, subset].max())

    return best_subset("mda", gram_CC, config.f, diameter)


def mda(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: MdaConfig | None = None
) -> Tensor:
    """Mean of the C − f contributions that lie closest together.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: f; None takes the default.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: f is not below half of the contributions, or there are too many subsets.
    """
    gram_CC = inner_products(deltas_CD)
    return combine(deltas_CD, mda_coefficients(gram_CC[0], gram_CC, config or MdaConfig()))


MDA = MergeMethod(
    name="mda", config=MdaConfig, scope="model", coefficients=mda_coefficients, needs_gram=True
)

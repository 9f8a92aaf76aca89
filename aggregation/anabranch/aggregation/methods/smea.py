"""Smallest maximum eigenvalue averaging (Allouah et al., 2302.01772).

Shape legend: C contributions, S of a subset, D entries.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine, inner_products
from anabranch.aggregation.robust.subsets import best_subset


class SmeaConfig(MethodConfig):
    """Parameters of smallest maximum eigenvalue averaging."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand; the cost is that of all subsets without f."""


def smea_coefficients(weights_C: Tensor, gram_CC: Tensor | None, config: SmeaConfig) -> Tensor:
    """1/(C − f) for the C − f contributions whose covariance has the least largest eigenvalue.

    The covariance of a subset has the non-zero eigenvalues of its centred Gram matrix, S x S and
    not D x D. ByzFL estimates the eigenvalue by one step from a random vector.

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
    products = gram_CC.numpy()

    def spread(subset: list[int]) -> float:
        mine_SS = products[subset][:, subset]
        means_S = mine_SS.mean(axis=0)
        centred_SS = mine_SS - means_S - means_S[:, None] + means_S.mean()
        return float(np.linalg.eigvalsh(centred_SS)[-1])

    return best_subset("smea", gram_CC, config.f, spread)


def smea(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: SmeaConfig | None = None
) -> Tensor:
    """Mean of the C − f contributions that vary least in their worst direction.

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
    return combine(deltas_CD, smea_coefficients(gram_CC[0], gram_CC, config or SmeaConfig()))


SMEA = MergeMethod(
    name="smea", config=SmeaConfig, scope="model", coefficients=smea_coefficients, needs_gram=True
)

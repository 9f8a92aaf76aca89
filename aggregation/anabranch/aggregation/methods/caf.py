"""Covariance-bound agnostic filter (Allouah et al., 2405.14432 and 2312.14712).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine, inner_products
from anabranch.aggregation.robust.arc import check_minority


class CafConfig(MethodConfig):
    """Parameters of the filter."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""


def caf_coefficients(weights_C: Tensor, gram_CC: Tensor | None, config: CafConfig) -> Tensor:
    """Coefficients of the weighted mean whose covariance had the least largest eigenvalue.

    Contributions lose weight by how far they lie along the worst direction, over and over, until
    2f of C are gone. With v = Σ y_i·(τ_i − μ) for the leading eigenvector y of the weighted,
    centred Gram matrix all of it runs in C x C numbers. ByzFL takes one step from a random vector
    for that direction, and fails for f = 0, where this is the mean.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: f.

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: f is not below half of the contributions.
    """
    assert gram_CC is not None
    count = len(gram_CC)
    check_minority("caf", config.f, count)
    left_C = torch.ones(count, dtype=torch.float64)
    best_C, least = left_C / count, torch.inf
    while float(left_C.sum()) > count - 2 * config.f:
        mean_C = left_C / left_C.sum()
        towards_C = gram_CC @ mean_C
        centred_CC = gram_CC - towards_C[:, None] - towards_C[None, :] + mean_C @ towards_C
        roots_C = mean_C.sqrt()
        values, vectors = torch.linalg.eigh(roots_C[:, None] * centred_CC * roots_C[None, :])
        if float(values[-1]) < least:
            best_C, least = mean_C, float(values[-1])
        # <τ_i − μ, v>² for v = Σ √m_j·y_j·(τ_j − μ).
        along_C = (centred_CC @ (roots_C * vectors[:, -1])).square()
        # Those without weight are gone, however far they lie.
        along_C = torch.where(left_C > 0, along_C, 0.0)
        if float(along_C.max()) == 0:
            break
        left_C = left_C * (1 - along_C / along_C.max())
    return best_C


def caf(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: CafConfig | None = None
) -> Tensor:
    """Mean of the contributions, less of those that spread it along its worst directions.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: f; None takes the default.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: f is not below half of the contributions.
    """
    gram_CC = inner_products(deltas_CD)
    return combine(deltas_CD, caf_coefficients(gram_CC[0], gram_CC, config or CafConfig()))


CAF = MergeMethod(
    name="caf", config=CafConfig, scope="model", coefficients=caf_coefficients, needs_gram=True
)

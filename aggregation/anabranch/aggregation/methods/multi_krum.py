"""Krum and Multi-Krum (Blanchard et al., NeurIPS 2017, 1703.02757).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import (
    MergeMethod,
    MethodConfig,
    combine,
    inner_products,
    squared_distances,
)


class MultiKrumConfig(MethodConfig):
    """Parameters of Multi-Krum."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""
    m: int | None = Field(None, ge=1)
    """Contributions averaged, best first; 1 is Krum, None takes C − f."""


def multi_krum_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: MultiKrumConfig
) -> Tensor:
    """1/m for the m contributions with the least sum of squared distances to their neighbours.

    Each is scored by its C − f − 2 nearest others, as in the paper and Flower (ByzFL takes one
    more). Weights are ignored: a client states its own. Equal scores go to the earlier one.

    Args:
        weights_C: Not read.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: f and m.

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: Too few contributions for f, or for m.
    """
    assert gram_CC is not None
    count = gram_CC.shape[0]
    if count <= 2 * config.f + 2:
        raise ValueError(
            f"multi_krum: f: {config.f} malicious need at least {2 * config.f + 3} contributions, "
            f"there are {count}; lower f or wait for more"
        )
    chosen = count - config.f if config.m is None else config.m
    if chosen > count:
        raise ValueError(
            f"multi_krum: m: {chosen} of {count} contributions cannot be chosen; lower m"
        )
    best_m = best_scores(gram_CC, config.f)[:chosen]
    return torch.zeros(count, dtype=torch.float64).index_fill_(0, best_m, 1 / chosen)


def best_scores(gram_CC: Tensor, f: int) -> Tensor:
    """All contributions [C], those first whose C − f − 2 nearest others are nearest.

    Of equal sums of squared distances the earlier contribution comes first.
    """
    distances_CC = squared_distances(gram_CC).fill_diagonal_(torch.inf)
    neighbours = len(gram_CC) - f - 2
    return distances_CC.sort(dim=1).values[:, :neighbours].sum(dim=1).argsort(stable=True)


def multi_krum(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: MultiKrumConfig | None = None
) -> Tensor:
    """Mean of the m contributions that lie closest to their neighbours.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: f and m; None takes the defaults.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: Too few contributions for f, or for m.
    """
    config = config or MultiKrumConfig()
    gram_CC = inner_products(deltas_CD)
    return combine(deltas_CD, multi_krum_coefficients(gram_CC[0], gram_CC, config))


MULTI_KRUM = MergeMethod(
    name="multi_krum",
    config=MultiKrumConfig,
    scope="model",
    coefficients=multi_krum_coefficients,
    needs_gram=True,
)

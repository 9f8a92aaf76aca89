"""Model Stock: how far to trust the average, from the angles (Jang et al., 2403.19522).

Shape legend: C contributions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, cosines


class ModelStockConfig(MethodConfig):
    """Parameters of Model Stock."""

    scope: Literal["tensor", "model"] = "tensor"
    """What angles are measured over: each module apart, or the whole model."""


def model_stock_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: ModelStockConfig
) -> Tensor:
    """t/C each, with t = C·c/(1 + (C − 1)c) and c the mean cosine of two contributions.

    The geometry behind it has contributions scatter around a centre at right angles, so c is an
    estimate of a number that cannot be negative: below zero it counts as zero, and the base stays.
    (mergekit lets t go below zero, and without bound as c nears −1/(C − 1).) A single contribution
    is returned as it is. Weights are ignored: the geometry is that of equals.

    Args:
        weights_C: Not read.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: Not read: ``scope`` matters to the engine only.

    Returns:
        Coefficients [C], fp64.
    """
    assert gram_CC is not None
    count = len(gram_CC)
    ratio = 1.0
    if count > 1:
        cosine_CC = cosines(gram_CC)
        pairs = float(cosine_CC.sum() - cosine_CC.diagonal().sum())
        mean_cosine = max(0.0, pairs / (count * (count - 1)))
        ratio = count * mean_cosine / (1 + (count - 1) * mean_cosine)
    return torch.full_like(weights_C, ratio / count)


MODEL_STOCK = MergeMethod(
    name="model_stock",
    config=ModelStockConfig,
    scope="tensor",
    coefficients=model_stock_coefficients,
    needs_gram=True,
)

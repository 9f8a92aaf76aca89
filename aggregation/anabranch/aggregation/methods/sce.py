"""SCE: select by variance, calculate weights, erase the minority (FuseChat: 2408.07990).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.election import disjoint_mean, elected_signs
from anabranch.aggregation.magnitude import kept
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.statistics import Found, Statistic


class SceConfig(MethodConfig):
    """Parameters of SCE."""

    select: float = Field(1.0, gt=0, le=1)
    """Fraction selected of the entries on which contributions differ, most variance first."""
    unselected: Literal["zero", "keep"] = "zero"
    """What the selection is for: ``zero`` drops the other entries (mergekit), ``keep`` leaves them
    out of the weights only (FuseAI's code)."""


def variance(deltas_CD: Tensor) -> Tensor:
    """Variance over the contributions [1, D], exactly zero where they are equal.

    Taken from the first contribution on: a mean of equal numbers need not be one of them.
    """
    first_D = deltas_CD[0]
    count = len(deltas_CD)
    mean_D, variance_D = torch.zeros_like(first_D), torch.zeros_like(first_D)
    for delta_D in deltas_CD[1:]:
        mean_D.add_(delta_D - first_D, alpha=1 / count)
    for delta_D in deltas_CD:
        variance_D.add_((delta_D - first_D).sub_(mean_D).square_(), alpha=1 / count)
    return variance_D[None]


def _variance(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    return variance(deltas_CD)


def _varies(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    return (variance(deltas_CD) > 0).float()


def _selected_squares(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    selected_1D = variance(deltas_CD) >= found["threshold_1"].to(deltas_CD.device)
    # In fp64: the square of a finite fp32 number need not be one.
    return deltas_CD.double().square_().mul_(selected_1D)


def _place_of_threshold(config: SceConfig, entries: int, found: Found) -> int:
    """⌊select·n⌋ of the n entries that vary, at least one; all entries if all are selected."""
    return entries if config.select == 1 else kept(config.select, int(found["varying_1"]))


def sce(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: SceConfig,
    *,
    varying_1: Tensor,
    threshold_1: Tensor,
    energies_C: Tensor,
) -> Tensor:
    """Per entry, the mean of those with the sign of Σ τ, weighted by their mean square.

    Mean squares are of the selected entries of the scope; a mean and a sum give the same weights.
    Weights given from outside are ignored: these take their place. Where contributions differ
    nowhere there is nothing to select by, and all entries are (mergekit then returns zeros). There
    is no fallback to uniform weights below a mean square of 1e-6, which real task vectors reach.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: What becomes of entries that are not selected.
        varying_1: Entries of the scope on which contributions differ [1]; not read.
        threshold_1: Least variance selected [1].
        energies_C: Σ τ² over the selected entries of the scope [C].

    Returns:
        Merged entries [D]: 0 where no contribution agrees.
    """
    if config.unselected == "zero":
        deltas_CD = deltas_CD * (variance(deltas_CD) >= threshold_1.to(deltas_CD.device))
    # Nothing but zeros has no energy, and merges to zero by any weights.
    shares_C = energies_C / energies_C.sum() if energies_C.any() else torch.ones_like(energies_C)
    signs_D = elected_signs(deltas_CD, torch.ones_like(shares_C))
    return disjoint_mean(deltas_CD, shares_C, signs_D)


SCE = MergeMethod(
    name="sce",
    config=SceConfig,
    scope="tensor",
    merge=sce,
    kernel="anabranch.aggregation.kernels.sce:sce",
    statistics=(
        Statistic("varying_1", _varies, "sum", kernel="anabranch.aggregation.kernels.sce:varying"),
        Statistic(
            "threshold_1",
            _variance,
            "kth_magnitude",
            _place_of_threshold,
            kernel="anabranch.aggregation.kernels.sce:variance",
        ),
        Statistic(
            "energies_C",
            _selected_squares,
            "sum",
            kernel="anabranch.aggregation.kernels.sce:energies",
        ),
    ),
)

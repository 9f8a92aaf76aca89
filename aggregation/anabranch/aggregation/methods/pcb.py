"""PCB-Merging: parameters compete within a task and between tasks (Du et al., 2410.02396).

The authors' repository holds three variants that disagree. This is the one of ``pcb-merging.py`` at
its root, which works on the whole model.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine
from anabranch.aggregation.statistics import Found, Statistic, entries_as_they_are

_WINSORISED = 1e-4
"""Share of the magnitudes cut off at either end."""


class PcbConfig(MethodConfig):
    """Parameters of PCB-Merging. The paper scales its result by 1.2: the recipe's ``scale``."""

    ratio: float = Field(0.1, gt=0, le=1)
    """Fraction of a task's entries, best scores first, that take part (r)."""
    scope: Literal["tensor", "model"] = "model"
    """Where entries compete: within each module, or over the whole model."""


def scores(deltas_CD: Tensor, weights_C: Tensor, low_C: Tensor, high_C: Tensor) -> Tensor:
    """How an entry fares within its task (intra) times how it fares between tasks (inter) [C, D].

    Intra is exp(C·level²), level being where the winsorised magnitude lies between low (0) and high
    (1); inter is tanh(τ_i·Σ τ_j). Here intra is divided by exp(C), which leaves the merge as it is
    and does not overflow at 89 tasks.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], of mean 1.
        low_C: Magnitudes below it count as it [C].
        high_C: Magnitudes above it count as it [C].
    """
    count = len(deltas_CD)
    total_D = combine(deltas_CD, weights_C)
    scores_CD = torch.empty_like(deltas_CD)
    bounds = zip(low_C.tolist(), high_C.tolist(), strict=True)
    for delta_D, score_D, (low, high) in zip(deltas_CD, scores_CD, bounds, strict=True):
        level_D = delta_D.abs().clamp_(low, high).sub_(low).div_(high - low if high > low else 1.0)
        torch.mul(delta_D, total_D, out=score_D)
        score_D.tanh_().mul_(level_D.square_().sub_(1.0).mul_(count).exp_())
    return scores_CD


def _scores(deltas_CD: Tensor, weights_C: Tensor, config: PcbConfig, found: Found) -> Tensor:
    return scores(deltas_CD, _of_mean_one(weights_C), found["low_C"], found["high_C"])


def _of_mean_one(weights_C: Tensor) -> Tensor:
    """The formula has no weights and counts every task once, so that is what equal ones do."""
    return weights_C * (len(weights_C) / weights_C.sum())


def _place_of_low(config: Any, entries: int, found: Found) -> int:
    return entries - int(entries * _WINSORISED)


def _place_of_high(config: Any, entries: int, found: Found) -> int:
    return entries - int(entries * (1 - _WINSORISED) - 1)


def _place_of_cut(config: PcbConfig, entries: int, found: Found) -> int:
    return max(1, entries - int(entries * (1 - config.ratio)))


def pcb(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: PcbConfig,
    *,
    low_C: Tensor,
    high_C: Tensor,
    cut_C: Tensor,
    best_C: Tensor,
) -> Tensor:
    """Mean of the winsorised task vectors, each entry weighted by how far its score passes the cut.

    Σ w s τ̂ / max(Σ w s, 1e-12) with s = (score − cut)/(best − cut), 0 below the cut. Where cut and
    best are one number, the authors' code divides zero by zero; here all that reach it count alike.
    tanh makes it a matter of scale: task vectors ten times as large do not merge to ten times as
    much.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more; in Σ τ_j and in the mean.
        config: Not read: the ratio and ``scope`` matter to the statistics only.
        low_C: Smallest winsorised magnitude [C].
        high_C: Largest winsorised magnitude [C].
        cut_C: Score an entry must pass [C].
        best_C: Best score [C].

    Returns:
        Merged entries [D]: 0 where no contribution takes part.
    """
    weights_C = _of_mean_one(weights_C)
    scores_CD = scores(deltas_CD, weights_C, low_C, high_C)
    sum_D, share_D = torch.zeros_like(deltas_CD[0]), torch.zeros_like(deltas_CD[0])
    bounds = torch.stack([low_C, high_C, cut_C, best_C, weights_C], dim=1).tolist()
    for delta_D, score_D, bound in zip(deltas_CD, scores_CD, bounds, strict=True):
        low, high, cut, best, weight = bound
        if best > cut:
            score_D.sub_(cut).div_(best - cut).clamp_(min=0)
        else:
            score_D.copy_(score_D >= cut)
        share_D.add_(score_D, alpha=weight)
        winsorised_D = delta_D.abs().clamp_(low, high).copysign_(delta_D).mul_(delta_D != 0)
        sum_D.addcmul_(winsorised_D, score_D, value=weight)
    return sum_D.div_(share_D.clamp_(min=1e-12))


PCB = MergeMethod(
    name="pcb",
    config=PcbConfig,
    scope="model",
    merge=pcb,
    statistics=(
        Statistic("low_C", entries_as_they_are, "kth_magnitude", _place_of_low),
        Statistic("high_C", entries_as_they_are, "kth_magnitude", _place_of_high),
        Statistic("cut_C", _scores, "kth", _place_of_cut),
        Statistic("best_C", _scores, "max"),
    ),
)

"""TIES with a robust election: nobody's weight or size counts beyond the cohort's median.

TIES (Yadav et al., 2306.01708) elects the sign of Σ w τ: one large contribution elects it alone.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.election import disjoint_mean
from anabranch.aggregation.magnitude import kept
from anabranch.aggregation.method import MergeMethod, MethodConfig, combine
from anabranch.aggregation.sparsify import trim
from anabranch.aggregation.statistics import Found, Statistic, entries_as_they_are, magnitudes


class RobustTiesConfig(MethodConfig):
    """Parameters of TIES with a robust election."""

    density: float = Field(0.2, gt=0, le=1)
    """Fraction of entries kept per task vector and tensor, by magnitude."""


def robust_ties(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: RobustTiesConfig,
    *,
    thresholds_C: Tensor,
    sums_C: Tensor,
    counts_C: Tensor,
    peaks_C: Tensor,
) -> Tensor:
    """Trim, elect a sign per entry by votes of bounded size, average the entries that carry it.

    A contribution's size in a tensor is the mean magnitude of what its trim keeps. One above the
    cohort's median is scaled down to it, a weight above the median weight counts as that, and an
    entry above the median of the contributions' largest is cut to it. In the election each has its
    weight times its size, and the sign of its entry: an entry larger than its others elects no
    more than they do. Where the votes balance, the result is zero.

    With fewer than half of the contributions malicious, each votes with no more than an honest one
    may, and no merged entry is larger than the largest honest one.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more; those of weight zero have no say.
        config: Not read: the density matters to the statistics only.
        thresholds_C: k-th magnitude over the tensor [C].
        sums_C: Σ of the magnitudes that the trim keeps [C], fp64.
        counts_C: How many those are, zeros left out [C], fp64.
        peaks_C: The largest magnitude [C].

    Returns:
        Merged entries [D].
    """
    sent_C = (counts_C > 0) & (weights_C > 0)
    if not bool(sent_C.any()):
        return torch.zeros_like(deltas_CD[0])
    weights_C = weights_C.clamp(max=_middle(weights_C[weights_C > 0]))
    sizes_C = sums_C / counts_C.clamp(min=1)
    cap = _middle(sizes_C[sent_C])
    factors_C = torch.where(sizes_C > cap, cap / sizes_C, 1.0)
    peak = _middle((peaks_C.double() * factors_C)[sent_C])
    kept_CD = trim(deltas_CD, thresholds_C)
    votes_D = combine(kept_CD.sign(), weights_C * sizes_C.clamp(max=cap) / cap)
    kept_CD.mul_(factors_C.float().to(kept_CD.device)[:, None]).clamp_(-peak, peak)
    return disjoint_mean(kept_CD, weights_C, votes_D.sign_())


def _middle(values_C: Tensor) -> float:
    return float(torch.quantile(values_C.double(), 0.5))


def _kept(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    return trim(deltas_CD, found["thresholds_C"]).abs_()


def _whether_kept(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    return (trim(deltas_CD, found["thresholds_C"]) != 0).float()


ROBUST_TIES = MergeMethod(
    name="robust_ties",
    config=RobustTiesConfig,
    scope="tensor",
    merge=robust_ties,
    statistics=(
        Statistic(
            "thresholds_C",
            entries_as_they_are,
            "kth_magnitude",
            count=lambda config, entries, found: kept(config.density, entries),
        ),
        Statistic("sums_C", _kept, "sum"),
        Statistic("counts_C", _whether_kept, "sum"),
        Statistic("peaks_C", magnitudes, "max"),
    ),
)

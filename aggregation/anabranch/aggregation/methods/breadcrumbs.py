"""Model Breadcrumbs: neither outliers nor small change (Davari and Belilovsky, 2312.06795).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.election import weighted_mean
from anabranch.aggregation.magnitude import kept
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.sparsify import trim_band
from anabranch.aggregation.statistics import Found, Statistic, entries_as_they_are


class BreadcrumbsConfig(MethodConfig):
    """Parameters of the two Breadcrumbs methods."""

    density: float = Field(0.2, gt=0, le=1)
    """Fraction of entries kept per task vector (ρ)."""
    gamma: float = Field(0.01, ge=0, lt=1)
    """Fraction of the largest entries dropped (γ); fewer where the density leaves no room."""
    scope: Literal["tensor", "model"] = "tensor"
    """What the fractions are of: each module's entries, or all of the model's."""


def _outliers(config: BreadcrumbsConfig, entries: int) -> int:
    """How many of the largest entries are dropped."""
    return min(int(config.gamma * entries), entries - kept(config.density, entries))


def _count_to_high(config: BreadcrumbsConfig, entries: int, found: Found) -> int:
    return _outliers(config, entries) + 1


def _count_to_low(config: BreadcrumbsConfig, entries: int, found: Found) -> int:
    return _outliers(config, entries) + kept(config.density, entries)


BAND = (
    Statistic("high_C", entries_as_they_are, "kth_magnitude", _count_to_high),
    Statistic("low_C", entries_as_they_are, "kth_magnitude", _count_to_low),
)
"""The largest and the smallest magnitude kept."""


def breadcrumbs(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: BreadcrumbsConfig,
    *,
    high_C: Tensor,
    low_C: Tensor,
) -> Tensor:
    """Weighted mean of what is left without the ⌊γD⌋ largest and all beyond the next ⌊ρD⌋ entries.

    Nothing is rescaled. Entries tied with the first or the last kept all stay: by position, as
    mergekit has it, they would be told apart for no reason, and a ternary update, all of one
    magnitude, would lose entries as outliers. Divided by Σw (mergekit's ``normalize: true``).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Not read: the fractions matter to the statistics only.
        high_C: Largest magnitude kept [C].
        low_C: Smallest magnitude kept [C].

    Returns:
        Merged entries [D].
    """
    return weighted_mean(trim_band(deltas_CD, low_C, high_C), weights_C)


BREADCRUMBS = MergeMethod(
    name="breadcrumbs",
    config=BreadcrumbsConfig,
    scope="tensor",
    merge=breadcrumbs,
    kernel="anabranch.aggregation.kernels.band:breadcrumbs",
    statistics=BAND,
)

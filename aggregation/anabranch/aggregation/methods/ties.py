"""TIES: trim, elect a sign, average those that agree (Yadav et al., 2306.01708).

References disagree; this is the variant with weights in the election, as mergekit has it. PEFT
elects before weighing and divides by the count, so the two agree at unit weights only. The paper's
code trims over the whole model (``scope = "model"``) and keeps one entry more.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.election import elect_and_average
from anabranch.aggregation.magnitude import kept
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.sparsify import trim
from anabranch.aggregation.statistics import Statistic, entries_as_they_are


class TiesConfig(MethodConfig):
    """Parameters of TIES."""

    density: float = Field(0.2, gt=0, le=1)
    """Fraction of entries kept per task vector, by magnitude."""
    scope: Literal["tensor", "model"] = "tensor"
    """What the fraction is of: each module's entries, or all of the model's."""


def ties(
    deltas_CD: Tensor, weights_C: Tensor, config: TiesConfig, *, thresholds_C: Tensor
) -> Tensor:
    """Trim by magnitude, elect a sign per entry, average the trimmed entries that carry it.

    Trimming keeps every entry at least as large as the k-th largest, k = max(1, ⌊density·D⌋):
    entries tied with the k-th all stay, where mergekit drops some of them by position. Entries
    of magnitude zero never count.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Not read: density and ``scope`` matter to the statistic only.
        thresholds_C: k-th magnitude over the scope [C].

    Returns:
        Merged entries [D]: 0 where nothing survives the trim.
    """
    return elect_and_average(trim(deltas_CD, thresholds_C), weights_C)


TIES = MergeMethod(
    name="ties",
    config=TiesConfig,
    scope="tensor",
    merge=ties,
    kernel="anabranch.aggregation.kernels.band:ties",
    ternary="anabranch.aggregation.kernels.ternary:ties",
    statistics=(
        Statistic(
            "thresholds_C",
            entries_as_they_are,
            "kth_magnitude",
            count=lambda config, entries, found: kept(config.density, entries),
        ),
    ),
)

"""Breadcrumbs in place of TIES's trim (2312.06795; Yadav et al., 2306.01708).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.election import elect_and_average
from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.breadcrumbs import BAND, BreadcrumbsConfig
from anabranch.aggregation.sparsify import trim_band


def breadcrumbs_ties(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: BreadcrumbsConfig,
    *,
    high_C: Tensor,
    low_C: Tensor,
) -> Tensor:
    """Drop outliers and small entries, then elect and average as TIES does.

    Divided by the weights that agree (mergekit with ``normalize: true``; its default for
    ``breadcrumbs_ties`` does not divide).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Not read: the fractions matter to the statistics only.
        high_C: Largest magnitude kept [C].
        low_C: Smallest magnitude kept [C].

    Returns:
        Merged entries [D]: 0 where no contribution agrees.
    """
    return elect_and_average(trim_band(deltas_CD, low_C, high_C), weights_C)


BREADCRUMBS_TIES = MergeMethod(
    name="breadcrumbs_ties",
    config=BreadcrumbsConfig,
    scope="tensor",
    merge=breadcrumbs_ties,
    kernel="anabranch.aggregation.kernels.band:breadcrumbs_ties",
    statistics=BAND,
)

"""DARE's random drop in place of TIES's trim (Yu et al., 2311.03099; Yadav et al., 2306.01708).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.dare_linear import DareConfig, drop_and_rescale
from anabranch.aggregation.methods.ties import elect_and_average


def dare_ties(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: DareConfig,
    *,
    keep_CD: Tensor | None = None,
) -> Tensor:
    """Drop at random, rescale by 1/density, then elect and average as TIES does.

    Divided by the weights that agree (mergekit with ``normalize: true``; its default for
    ``dare_ties`` does not divide).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Density and seed.
        keep_CD: Boolean masks [C, D]; None draws them.

    Returns:
        Merged entries [D].
    """
    return elect_and_average(drop_and_rescale(deltas_CD, config, keep_CD), weights_C)


DARE_TIES = MergeMethod(
    name="dare_ties",
    config=DareConfig,
    scope="entry",
    merge=dare_ties,
    statistics=("keep_CD",),
)

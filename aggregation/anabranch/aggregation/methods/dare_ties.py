"""DARE's random drop in place of TIES's trim (Yu et al., 2311.03099; Yadav et al., 2306.01708).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.election import elect_and_average
from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.dare_linear import KEEP, DareConfig
from anabranch.aggregation.sparsify import drop_and_rescale


def dare_ties(
    deltas_CD: Tensor, weights_C: Tensor, config: DareConfig, *, keep_CD: Tensor
) -> Tensor:
    """Drop at random, rescale by 1/density, then elect and average as TIES does.

    Divided by the weights that agree (mergekit with ``normalize: true``; its default for
    ``dare_ties`` does not divide).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Density and seed.
        keep_CD: Boolean masks [C, D].

    Returns:
        Merged entries [D].
    """
    return elect_and_average(drop_and_rescale(deltas_CD, keep_CD, config.density), weights_C)


DARE_TIES = MergeMethod(
    name="dare_ties",
    config=DareConfig,
    scope="entry",
    merge=dare_ties,
    kernel="anabranch.aggregation.kernels.dare:dare_ties",
    draws=(KEEP,),
)

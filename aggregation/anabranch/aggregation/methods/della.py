"""DELLA: drop by magnitude, elect, fuse (Deep et al., 2406.11617).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.election import elect_and_average
from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.della_linear import SURVIVORS, DellaConfig


def della(
    deltas_CD: Tensor, weights_C: Tensor, config: DellaConfig, *, factors_CD: Tensor
) -> Tensor:
    """Drop small entries more often than large ones, then elect and average as TIES does.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Not read: it matters to the draw only.
        factors_CD: 1/p_keep of the survivors, 0 for the rest [C, D].

    Returns:
        Merged entries [D]: 0 where no contribution agrees.
    """
    return elect_and_average(deltas_CD * factors_CD, weights_C)


DELLA = MergeMethod(
    name="della",
    config=DellaConfig,
    scope="tensor",
    merge=della,
    kernel="anabranch.aggregation.kernels.della:della",
    draws=(SURVIVORS,),
    whole_vectors=True,
)

"""Coordinate-wise median (Yin et al., 1803.01498): holds while fewer than half are malicious.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig


class MedianConfig(MethodConfig):
    """No parameters."""


def median(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: MedianConfig | None = None
) -> Tensor:
    """The middle value of each entry; the mean of the middle two when C is even.

    Weights are ignored: a client states its own, and one that claimed enough would be the median.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: Not read.

    Returns:
        Merged entries [D].
    """
    count = deltas_CD.shape[0]
    # Not torch.median: on an expanded tensor (stride 0) torch 2.13 reads beyond its memory.
    low_D = deltas_CD.kthvalue((count + 1) // 2, dim=0).values
    if count % 2:
        return low_D
    high_D = deltas_CD.kthvalue(count // 2 + 1, dim=0).values
    # Halved before the sum: the two may be large and of one sign.
    return low_D / 2 + high_D / 2


MEDIAN = MergeMethod(
    name="median",
    config=MedianConfig,
    scope="entry",
    merge=median,
    kernel="anabranch.aggregation.kernels.order:median",
)

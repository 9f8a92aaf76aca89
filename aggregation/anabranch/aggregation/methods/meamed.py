"""Mean around the median (Xie et al., 1802.10116).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.robust.arc import check_minority


class MeamedConfig(MethodConfig):
    """Parameters of the mean around the median."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""


def meamed(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: MeamedConfig | None = None
) -> Tensor:
    """Entry by entry the mean of the C − f values nearest to the median.

    Weights are ignored: a client states its own.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: f; None takes the default.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: f is not below half of the contributions.
    """
    config = config or MeamedConfig()
    check_minority("meamed", config.f, len(deltas_CD))
    return mean_around_median(deltas_CD, config.f)


def mean_around_median(deltas_CD: Tensor, f: int) -> Tensor:
    """The mean of all but the f values furthest from the median [D], summed in fp64.

    Sorted, those that stay are neighbours: the f + 1 stretches of C − f values are tried from the
    smallest on. Of two values equally near the smaller one stays, whoever sent it.

    Args:
        deltas_CD: Task vectors [C, D], fp32.
        f: How many are left out of each entry, fewer than C.
    """
    count = len(deltas_CD)
    left = count - f
    sorted_CD = deltas_CD.sort(dim=0).values
    # Halved before the sum: the two may be large and of one sign.
    middle_D = sorted_CD[(count - 1) // 2] / 2 + sorted_CD[count // 2] / 2
    first_D = torch.zeros_like(middle_D, dtype=torch.int64)
    for start in range(f):
        first_D += middle_D - sorted_CD[start] > sorted_CD[start + left] - middle_D
    total_D = torch.zeros_like(middle_D, dtype=torch.float64)
    for value in range(left):
        total_D += sorted_CD.gather(0, (first_D + value)[None])[0]
    return total_D.div_(left).float()


MEAMED = MergeMethod(
    name="meamed",
    config=MeamedConfig,
    scope="entry",
    merge=meamed,
    kernel="anabranch.aggregation.kernels.order:meamed",
)

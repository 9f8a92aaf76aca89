"""Mean around the median (Xie et al., 1802.10116).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.median import median
from anabranch.aggregation.robust.arc import check_minority


class MeamedConfig(MethodConfig):
    """Parameters of the mean around the median."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""


def meamed(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: MeamedConfig | None = None
) -> Tensor:
    """Entry by entry the mean of the C − f values nearest to the median.

    Weights are ignored: a client states its own. Of values equally near, the earlier ones count.

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
    count = len(deltas_CD)
    check_minority("meamed", config.f, count)
    distances_CD = (deltas_CD - median(deltas_CD)).abs()
    near_ND = distances_CD.sort(dim=0, stable=True).indices[: count - config.f]
    merged_D: Tensor = deltas_CD.gather(0, near_ND).double().mean(dim=0).float()
    return merged_D


MEAMED = MergeMethod(name="meamed", config=MeamedConfig, scope="entry", merge=meamed)

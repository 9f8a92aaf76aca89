"""MagMax: per entry, the largest change wins (Marczak et al., 2407.06322).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig


class MagMaxConfig(MethodConfig):
    """No parameters: λ is the recipe's ``scale``."""


def magmax(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: MagMaxConfig | None = None
) -> Tensor:
    """The entry of largest magnitude among the contributions; of two opposite ones, the positive.

    Weights are ignored, as in the paper: the winner takes the entry as it is.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: Not read.

    Returns:
        Merged entries [D].
    """
    high_D, low_D = deltas_CD.amax(dim=0), deltas_CD.amin(dim=0)
    return torch.where(high_D >= -low_D, high_D, low_D)


MAGMAX = MergeMethod(
    name="magmax",
    config=MagMaxConfig,
    scope="entry",
    merge=magmax,
    kernel="anabranch.aggregation.kernels.votes:magmax",
)

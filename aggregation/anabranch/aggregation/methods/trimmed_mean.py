"""Coordinate-wise trimmed mean (Yin et al., 1803.01498).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine


class TrimmedMeanConfig(MethodConfig):
    """Parameters of the trimmed mean."""

    trim: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=0.5)] = 1
    """Values dropped at each end of every entry: a count, or a fraction of the contributions
    (rounded down)."""

    def dropped(self, count: int) -> int:
        """How many of ``count`` contributions are dropped at each end.

        Raises:
            ValueError: Nothing would be left (2·trim ≥ C).
        """
        trim = self.trim if isinstance(self.trim, int) else int(self.trim * count)
        if 2 * trim >= count:
            raise ValueError(
                f"trimmed_mean: trim: dropping {trim} at each end leaves nothing of {count} "
                f"contributions; set trim to {(count - 1) // 2} or less, or wait for {2 * trim + 1}"
            )
        return trim


def trimmed_mean(deltas_CD: Tensor, weights_C: Tensor | None, config: TrimmedMeanConfig) -> Tensor:
    """Drop the ``trim`` smallest and largest values of each entry, average the rest.

    Weights are ignored: a client states its own.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: How many to drop.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: Nothing would be left (2·trim ≥ C).
    """
    count = deltas_CD.shape[0]
    trim = config.dropped(count)
    left = count - 2 * trim
    middle_CD = deltas_CD.sort(dim=0).values[trim : count - trim]
    return combine(middle_CD, torch.full((left,), 1 / left, dtype=torch.float64))


TRIMMED_MEAN = MergeMethod(
    name="trimmed_mean",
    config=TrimmedMeanConfig,
    scope="entry",
    merge=trimmed_mean,
    kernel="anabranch.aggregation.kernels.order:trimmed_mean",
)

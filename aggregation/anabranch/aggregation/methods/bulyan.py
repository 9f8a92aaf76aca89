"""Bulyan: a mean around the median of those that Krum trusts (El Mhamdi et al., 1802.07927).

Shape legend: C contributions, S of them that are selected, D entries.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.meamed import mean_around_median
from anabranch.aggregation.methods.multi_krum import best_scores


class BulyanConfig(MethodConfig):
    """Parameters of Bulyan."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand; it takes 4f + 3 contributions or more."""


def selected(gram_CC: Tensor, config: BulyanConfig) -> Tensor:
    """Places of the C − 2f contributions with the best Krum scores [S], ascending.

    All are scored once, as Flower does it; the paper scores those that are left again after each.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: f.

    Raises:
        ValueError: Fewer than 4f + 3 contributions.
    """
    count = len(gram_CC)
    if count < 4 * config.f + 3:
        raise ValueError(
            f"bulyan: f: {config.f} malicious need at least {4 * config.f + 3} contributions, "
            f"there are {count}; lower f or wait for more"
        )
    best_S: Tensor = best_scores(gram_CC, config.f)[: count - 2 * config.f].sort().values
    return best_S


def bulyan(deltas_CD: Tensor, weights_C: Tensor, config: Any, *, gram_CC: Tensor) -> Tensor:
    """Entry by entry the mean of the C − 4f values nearest to the median, of those selected.

    Weights are ignored: a client states its own. Krum bounds how far off a selected contribution
    is as a whole; the second step keeps it from spending all of that on one entry.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: f.
        gram_CC: Inner products of the task vectors over the model [C, C], fp64.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: Fewer than 4f + 3 contributions.
    """
    best_S = selected(gram_CC, config)
    return mean_around_median(deltas_CD[best_S], 2 * config.f)


BULYAN = MergeMethod(
    name="bulyan",
    config=BulyanConfig,
    scope="model",
    merge=bulyan,
    needs_gram=True,
    kernel="anabranch.aggregation.kernels.order:bulyan",
)

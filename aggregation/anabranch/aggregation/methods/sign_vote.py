"""Majority vote of signs (signSGD: Bernstein et al., 1802.04434 and 1810.05291).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine
from anabranch.aggregation.statistics import Found, Statistic, magnitudes


class SignVoteConfig(MethodConfig):
    """No parameters: the step is the recipe's ``scale`` times the mean magnitude."""


def sign_vote(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: Any,
    *,
    sums_C: Tensor,
    counts_C: Tensor,
) -> Tensor:
    """Per entry, the sign that outweighs the other, times one magnitude for the tensor.

    A contribution moves an entry by its weight and no further, whatever it sends: of unit weights,
    fewer than half cannot turn an entry on which the rest agree. Zeros abstain; where the votes
    balance, the result is zero. The paper takes a step of the learning rate; here it is the median
    magnitude (``step``), in which nobody has more than one say either.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight of each vote [C], zero or more.
        config: Not read.
        sums_C: Σ |τ| over the tensor [C], fp64.
        counts_C: How many entries are not zero [C], fp64.

    Returns:
        Merged entries [D]: −step, 0 or step.
    """
    votes_D = combine(deltas_CD.sign(), weights_C)
    return votes_D.sign_().mul_(step(sums_C, counts_C, weights_C))


def step(sums_C: Tensor, counts_C: Tensor, weights_C: Tensor) -> float:
    """The middle of the mean magnitudes of those who vote and send something; 0 of nobody."""
    sent = (counts_C > 0) & (weights_C > 0)
    if not bool(sent.any()):
        return 0.0
    return float(torch.quantile(sums_C[sent] / counts_C[sent], 0.5))


def _nonzeros(deltas_CD: Tensor, weights_C: Tensor, config: Any, found: Found) -> Tensor:
    return (deltas_CD != 0).float()


SIGN_VOTE = MergeMethod(
    name="sign_vote",
    config=SignVoteConfig,
    scope="tensor",
    merge=sign_vote,
    ternary="anabranch.aggregation.kernels.ternary:sign_vote",
    statistics=(
        Statistic("sums_C", magnitudes, "sum"),
        Statistic("counts_C", _nonzeros, "sum"),
    ),
)

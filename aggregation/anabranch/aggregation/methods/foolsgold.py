"""FoolsGold: those that say the same count less (Fung et al., RAID 2020, 1808.04866).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import (
    MergeMethod,
    MethodConfig,
    combine,
    cosines,
    inner_products,
)


class FoolsGoldConfig(MethodConfig):
    """Parameters of FoolsGold."""

    confidence: float = Field(1.0, gt=0)
    """How sharply weights part into none and all (κ in the paper)."""
    history: tuple[tuple[float, ...], ...] | None = None
    """Cosine similarities of what each contribution sent in all rounds, summed, this one included
    [C][C]; whoever runs the rounds keeps the sums. None takes this round's, which Sybils that take
    turns escape."""


def foolsgold_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: FoolsGoldConfig
) -> Tensor:
    """Coefficients, summing to 1, that fall with the likeness to whoever is most alike.

    As the authors' code does it: a contribution that is like a Sybil without being one is pardoned
    by the ratio of their largest likenesses; the largest weight becomes 1, and the logit spreads
    them. Where all are equally alike, all count alike. The paper adds the weighted updates up; here
    it is their mean. Nothing in this withstands one attacker, and honest clients that agree closely
    look like Sybils.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: κ, and the likeness of the sums.

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: A history that is not of these contributions.
    """
    assert gram_CC is not None
    count = len(gram_CC)
    alike_CC = cosines(gram_CC) if config.history is None else _given(config.history, count)
    alike_CC = alike_CC.clone().fill_diagonal_(0)
    most_C = alike_CC.amax(dim=1)
    # Where j is more of a Sybil than i, their likeness is held less against i.
    pardoned_CC = torch.where(
        most_C[:, None] < most_C[None, :], alike_CC * most_C[:, None] / most_C[None, :], alike_CC
    )
    trust_C = (1 - pardoned_CC.amax(dim=1)).clamp(0, 1)
    # What rounding leaves of nothing would be made everything below.
    trust_C = torch.where(trust_C > 1e-12, trust_C, 0.0)
    if not bool(trust_C.any()):
        return torch.full((count,), 1 / count, dtype=torch.float64)
    trust_C = (trust_C / trust_C.max()).clamp(max=0.99)
    trust_C = (config.confidence * (torch.log(trust_C / (1 - trust_C)) + 0.5)).clamp(0, 1)
    return trust_C / trust_C.sum()


def _given(history: tuple[tuple[float, ...], ...], count: int) -> Tensor:
    shape = {len(row) for row in history}
    if len(history) != count or shape != {count}:
        raise ValueError(
            f"foolsgold: history: is of {len(history)} contributions, there are {count}; give the "
            "likeness of each with each, in their order"
        )
    alike_CC = torch.tensor(history, dtype=torch.float64)
    if not bool((alike_CC.abs() <= 1 + 1e-6).all()) or not torch.equal(alike_CC, alike_CC.T):
        raise ValueError(
            "foolsgold: history: holds what are no cosines; give numbers from -1 to 1, the same "
            "both ways"
        )
    return alike_CC


def foolsgold(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: FoolsGoldConfig | None = None
) -> Tensor:
    """Mean in which those that say the same count less.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: κ, and the likeness of the sums; None takes the defaults.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: A history that is not of these contributions.
    """
    gram_CC = inner_products(deltas_CD)
    coefficients_C = foolsgold_coefficients(gram_CC[0], gram_CC, config or FoolsGoldConfig())
    return combine(deltas_CD, coefficients_C)


FOOLSGOLD = MergeMethod(
    name="foolsgold",
    config=FoolsGoldConfig,
    scope="model",
    coefficients=foolsgold_coefficients,
    needs_gram=True,
)

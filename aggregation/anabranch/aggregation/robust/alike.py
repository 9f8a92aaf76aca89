"""Colluders are more alike than honest clients: a small group that is has no say.

Honest clients draw their batches apart, so their updates have little in common beyond the task;
those that train towards one trigger have that trigger (FoolsGold's observation: Fung et al.,
1808.04866). FoolsGold weighs everybody down by likeness; this looks for one group of bounded size,
and does nothing where there is none.

Shape legend: C contributions.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig, cosines
from anabranch.aggregation.robust.arc import check_minority
from anabranch.aggregation.robust.pre import PreAggregator


class AlikeConfig(MethodConfig):
    """Parameters of leaving out who is too much alike."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand: the most that a group may have."""
    gap: float = Field(0.1, gt=0, le=2)
    """By how much the cosines inside a group are above anybody else's to as many."""


def alike(gram_CC: Tensor, config: AlikeConfig) -> Tensor:
    """Puts the mean of the others in the place of a group that is more alike than they are.

    A contribution's likeness, for groups of s, is its mean cosine to the s − 1 it is most like. The
    s largest are such a group if the least of them is ``gap`` above all others. The largest group
    of at most f is taken; one alone is like nobody, so f = 1 changes nothing.

    Honest clients that share their data are found, too, where the others share none; places are
    filled and not dropped, as by ``oversized``.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: How many, and how much more alike.

    Returns:
        The map [C, C], fp64.

    Raises:
        ValueError: f is not below half of the contributions.
    """
    count = len(gram_CC)
    check_minority("alike", config.f, count)
    mix_CC = torch.eye(count, dtype=torch.float64)
    nearest_CC = cosines(gram_CC).fill_diagonal_(-torch.inf).sort(dim=1, descending=True).values
    for size in range(config.f, 1, -1):
        likeness_C = nearest_CC[:, : size - 1].mean(dim=1)
        ordered = likeness_C.sort(descending=True, stable=True)
        if float(ordered.values[size - 1] - ordered.values[size]) >= config.gap:
            kept_C = torch.ones(count, dtype=torch.bool)
            kept_C[ordered.indices[:size]] = False
            mix_CC[~kept_C] = kept_C.double() / kept_C.sum()
            break
    return mix_CC


ALIKE = PreAggregator("alike", AlikeConfig, alike)

"""De-duplication: what is sent many times counts once (against Sybils: Douceur, IPTPS 2002).

Shape legend: C contributions, K groups of them.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig, cosines, squared_distances
from anabranch.aggregation.robust.linkage import linked
from anabranch.aggregation.robust.pre import PreAggregator, norms


class DedupConfig(MethodConfig):
    """Parameters of de-duplication."""

    cosine: float = Field(0.99, gt=-1, le=1)
    """From this cosine similarity on two are the same, whatever their norms."""
    distance: float = Field(0.05, ge=0)
    """So they are up to this distance, in units of the larger norm."""


def dedup(gram_CC: Tensor, config: DedupConfig) -> Tensor:
    """Puts the mean of near-identical task vectors in their place: one organisation, one say.

    What is the same as a third is the same: copies that are each a little off the last one make one
    group. Honest clients that start from one adapter and see other data are far from this; those
    that share their data are not, and count once, too.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: What is the same.

    Returns:
        The map [K, C], fp64; the groups in the order of their first.
    """
    norms_C = norms(gram_CC)
    larger_CC = torch.maximum(norms_C[:, None], norms_C[None, :])
    near_CC = squared_distances(gram_CC).sqrt() <= config.distance * larger_CC
    # Rounding leaves the cosine of two equal ones a little below 1.
    near_CC |= cosines(gram_CC) >= config.cosine - 1e-12
    groups = linked(near_CC)
    mix_KC = torch.zeros(len(groups), len(gram_CC), dtype=torch.float64)
    for row, group in enumerate(groups):
        mix_KC[row, group] = 1 / len(group)
    return mix_KC


DEDUP = PreAggregator("dedup", DedupConfig, dedup)

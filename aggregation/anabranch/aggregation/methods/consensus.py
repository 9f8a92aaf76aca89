"""Consensus merging with TALL-masks (Wang et al., 2405.07813).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine


class ConsensusConfig(MethodConfig):
    """Parameters of Consensus."""

    mask_scale: float = Field(0.4, ge=0)
    """An entry is a task's own where its part is more than this many times what all others add (λ;
    the paper chooses among .2 to .6 by validation)."""
    votes: int = Field(2, ge=1)
    """An entry stays if it is the own of so many contributions: 2 drops what is selfish or idle."""

    def check(self, count: int) -> None:
        """Refuse more votes than there are contributions.

        Raises:
            ValueError: There are.
        """
        if self.votes > count:
            raise ValueError(
                f"consensus: votes: {self.votes} of {count} contributions never agree; "
                "lower votes or wait for more"
            )


def consensus(deltas_CD: Tensor, weights_C: Tensor, config: ConsensusConfig) -> Tensor:
    """Σ w τ where at least ``votes`` masks agree, 0 elsewhere.

    The TALL-mask of a task is |w_t τ_t| > λ·|Σ w τ − w_t τ_t|: the paper's |θ0 − θ_t| against
    |θ_MTL − θ_t|, with w_t τ_t for the task vector. (FusionBench's TallMask class compares τ where
    θ is meant.)

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], of any sign; not divided by their sum.
        config: λ and the votes.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: More votes asked for than there are contributions.
    """
    return combine(deltas_CD, weights_C).mul_(agreed(deltas_CD, weights_C, config))


def agreed(deltas_CD: Tensor, weights_C: Tensor, config: ConsensusConfig) -> Tensor:
    """Whether at least ``votes`` masks agree, boolean [D]; see ``consensus``."""
    config.check(len(deltas_CD))
    total_D = combine(deltas_CD, weights_C)
    votes_D = torch.zeros_like(total_D)
    for delta_D, weight in zip(deltas_CD, weights_C.tolist(), strict=True):
        part_D = delta_D * weight
        others_D = (total_D - part_D).abs_().mul_(config.mask_scale)
        votes_D += part_D.abs_() > others_D
    return votes_D >= config.votes


CONSENSUS = MergeMethod(
    name="consensus",
    config=ConsensusConfig,
    scope="entry",
    merge=consensus,
    kernel="anabranch.aggregation.kernels.votes:consensus",
    signed_weights=True,
)

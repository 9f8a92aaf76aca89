"""Signed-rank voting: rank voting (FRL, Mozaffari et al., USENIX Security 2023) on task vectors.

FRL's clients vote with the ranks of scores, its server sums them: no client has more than one
permutation to say. Here they rank the magnitudes of a task vector, and the vote carries the sign.

Shape legend: D entries of one tensor.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.magnitude import kept
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.ranking import by_place, tally
from anabranch.aggregation.whole import Whole


class RankVoteConfig(MethodConfig):
    """Parameters of signed-rank voting."""

    density: float = Field(0.5, gt=0, le=1)
    """Share of each tensor's entries that are kept, by |votes|; entries tied with the last all
    stay."""
    approvals: float | None = Field(None, gt=0, le=1)
    """None: an entry's vote is its rank. A share: the largest so many of each contribution's
    entries get a vote of one, the others none; entries tied with the last all vote."""


def rank_vote(parts: Whole, weights_C: Tensor, config: RankVoteConfig) -> Tensor:
    """Sum s·r over the contributions, keep the entries of most |votes|, give them their sign.

    s is the sign of an entry, r the rank of its magnitude in the tensor, 1 for the least. Equal
    magnitudes share the mean of their ranks; sums are of 2r, in integers. Zeros abstain, and where
    the votes balance, the result is zero. The entry in the j-th place by |votes| takes the median
    over the contributions of their j-th magnitudes; equals share the mean of their places', so that
    no entry gains by where it stands. A contribution's size so matters to that median alone.

    f of C contributions turn an entry only where the honest votes for its sign are below what f can
    say: f·D of ranks, f of approvals. Below C/2 of them, no entry gets larger than the largest
    honest one.

    Weights are ignored: a client states its own.

    Args:
        parts: Task vectors.
        weights_C: Not read.
        config: What is kept, and whether ranks or approvals are counted.

    Returns:
        Merged entries [D].
    """
    approved = None if config.approvals is None else kept(config.approvals, parts.entries)

    def vote(entries_L: Tensor, order_L: Tensor, places_L: Tensor, sorted_D: Tensor) -> Tensor:
        signs_L = entries_L.sign().long()
        if approved is None:
            return signs_L * (places_L + 2)
        return signs_L * (entries_L.abs() >= sorted_D[len(sorted_D) - approved])

    votes_D, curve_D = tally(parts, Tensor.abs, vote)
    sizes_D = votes_D.abs()
    least = sizes_D.kthvalue(parts.entries + 1 - kept(config.density, parts.entries)).values
    merged_D = by_place(curve_D, sizes_D).mul_(votes_D.sign())
    return merged_D.mul_(sizes_D >= least)


RANK_VOTE = MergeMethod(
    name="rank_vote",
    config=RankVoteConfig,
    scope="tensor",
    merge=rank_vote,
    whole_tensors=True,
)

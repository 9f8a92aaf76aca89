"""FRL's vote on supermask scores (Mozaffari et al., USENIX Security 2023).

Clients train scores of frozen weights (``vectors.supermask``), and the server adds up ranks.

Shape legend: D entries of one tensor.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.ranking import by_place, tally
from anabranch.aggregation.whole import Whole
from anabranch.vectors.supermask import supermask


class SupermaskConfig(MethodConfig):
    """Parameters of the vote on scores."""

    gives: Literal["scores", "mask"] = "scores"
    """The voted scores, to train on from; or 1 for the entries of the highest, 0 for the rest."""
    density: float = Field(0.5, gt=0, le=1)
    """With ``mask``: share of entries that are 1."""


def vote_on_scores(parts: Whole, weights_C: Tensor, config: SupermaskConfig) -> Tensor:
    """Add up the places that contributions give each entry, sort, give places their scores again.

    The entry in the j-th place by the sum takes the median of the contributions' j-th scores; FRL
    takes the j-th of the server's, which are the same permuted. Equal scores share the mean of
    their places. Scores rank by their sign, in the vote as in the mask: see
    ``vectors.supermask.supermask`` for what the published code does.

    What is ranked is what is merged, so scores are merged whole, without a start or a base. Weights
    are ignored: a client states its own.

    Args:
        parts: Scores.
        weights_C: Not read.
        config: Whether scores or their mask are wanted.

    Returns:
        Scores, or zeros and ones [D].
    """
    votes_D, curve_D = tally(parts, lambda scores_D: scores_D, _places)
    scores_D = by_place(curve_D, votes_D)
    return scores_D if config.gives == "scores" else supermask(scores_D, config.density).float()


def _places(entries_L: Tensor, order_L: Tensor, places_L: Tensor, sorted_D: Tensor) -> Tensor:
    return places_L


SUPERMASK = MergeMethod(
    name="supermask",
    config=SupermaskConfig,
    scope="tensor",
    merge=vote_on_scores,
    whole_tensors=True,
)

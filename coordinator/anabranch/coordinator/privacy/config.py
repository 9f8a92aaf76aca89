"""What a federation promises about its clients, as configuration. Loads no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from anabranch.aggregation.recipe import Recipe
from anabranch.wire.plan import Trains


class PrivacyConfig(BaseModel):
    """Client-level (ε, δ)-differential privacy of the adapters that a federation makes.

    Two runs are neighbours if they are alike but for one client, whose updates count as zeros in
    all rounds of one of them; who is asked, answers and is admitted is taken as known
    (``privacy.accountant``). Every round counts each client in full: nothing is taken off for
    ``fraction``, whose draw is no secret.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip: float = Field(gt=0)
    """C: the largest ‖update‖₂ that counts whole, over all that travels; a larger one is scaled
    down to it."""
    epsilon: float = Field(gt=0, le=1000)
    """ε that all rounds together may spend: a round that would go beyond is not begun."""
    delta: float = Field(gt=0, lt=1)
    """δ of the same promise; well below one over the number of clients, or it promises little."""
    noise_multiplier: float | None = Field(None, gt=0, le=1e6)
    """Standard deviation of the noise on the sum of the updates, over C; None takes the least with
    which what is left of ε lasts for all rounds that are left."""
    noise_seed: int | None = Field(None, ge=0)
    """Draws the noise from a seed, so that an experiment can be repeated. Whoever knows it takes
    the noise off again: nothing is promised then, and no ε is reported."""


def why_not_private(recipe: Recipe, trains: Trains, ranks: object, rest: str) -> str | None:
    """Why noise on a sum of updates could not be accounted for with these settings; None if it can.

    The sum has to be what is published: an equal-weight mean of just the entries that travel, so
    that one client moves it by no more than its clipped update.
    """
    wanted = "fedit" if trains == "both" else "mean"
    if recipe.method != wanted:
        why = "which averages what travels" if trains == "both" else "of the factor that is trained"
        return (
            f'recipe.method = "{recipe.method}" has no known sensitivity; set it to "{wanted}", '
            f"{why}"
        )
    if recipe.params or recipe.pre or recipe.modules or recipe.scale != 1.0:
        return "the mean must be plain; leave params, pre, modules and scale out of the recipe"
    if recipe.suspicion is not None:
        return "what is found of single clients is published without noise; leave suspicion out"
    if ranks:
        return "clients of several ranks have no common sensitivity; leave ranks out"
    if rest != "drop":
        return f'the rest of rank that "{rest}" keeps is published without noise; leave rest out'
    return None


def why_not_counted(clients: int, asked: int, quorum: int) -> str | None:
    """Why the number that noisy sums are divided by is not known beforehand; None if it is.

    It is the number of clients that every round asks. How many are there, or reply, depends on
    them: it is nothing to divide by.

    Args:
        clients: How many the federation is said to have.
        asked: How many of so many a round asks.
        quorum: How many have to be admitted.
    """
    if clients < 2:
        return (
            "each round asks clients x fraction of them and divides the noisy sum by as many; "
            f"set clients, which is {clients}, to how many the federation has"
        )
    if quorum > asked:
        return (
            f"each round asks {asked} of {clients} clients and divides the noisy sum by as many, "
            f"which cannot make a quorum of {quorum}; lower quorum, or raise clients or fraction"
        )
    return None

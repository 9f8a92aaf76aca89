"""A round's merge: the cohort's ends and the recipe in, the next adapter out."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.aggregation import (
    MergeMethod,
    MergeReport,
    Recipe,
    merge,
    merge_keeping,
    merge_one_factor,
)
from anabranch.aggregation.engine.suspected import check_suspicion
from anabranch.aggregation.methods.fltrust import FLTRUST, FlTrustConfig
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.ledger import Release
from anabranch.coordinator.privacy.mechanism import private_mean
from anabranch.coordinator.privacy.noise import GaussianStream
from anabranch.coordinator.start import Start
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.frozen import join


def merge_cohort(
    config: FederationConfig,
    whole: Start,
    starts: Sequence[Start],
    ends: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float] | None = None,
) -> tuple[Adapter, MergeReport]:
    """Merge what the clients trained into the next adapter in service.

    Args:
        config: The federation.
        whole: The round's start at full rank.
        starts: What each client started from.
        ends: What each trained from there.
        names: The clients.
        weights: How much each counts, where that differs; some start elsewhere than ``whole`` then.

    Returns:
        The adapter, frozen ranks after the trained ones, and the report.

    Raises:
        ValueError: The method cannot merge this cohort.
    """
    recipe, start, trained = config.recipe, whole.adapter, whole.plan.trained
    if trained != "both":
        result = merge_one_factor(ends, recipe, trained, start=start, names=names)
        return result.adapter, result.report
    theirs = [one.adapter for one in starts] if config.ranks or weights else None
    if config.rest == "drop":
        result = merge(ends, recipe, start=start, starts=theirs, weights=weights, names=names)
        return result.adapter, result.report
    kept = merge_keeping(
        ends,
        recipe,
        config.rest,
        start=start,
        starts=theirs,
        # A draw of its own for each round: one A for all would reach the same directions always.
        fresh=seeded_start(start, config.seed + whole.plan.round),
        frozen=whole.frozen,
        names=names,
    )
    return join(kept.trained, kept.frozen), kept.report


def merge_privately(
    release: Release,
    noise: GaussianStream,
    whole: Start,
    ends: Sequence[Adapter],
    names: Sequence[str],
) -> tuple[Adapter, MergeReport]:
    """The start plus the noisy mean of the clipped changes, over the clients a round asks.

    Args:
        release: How the sum is made; what the account is told.
        noise: Where its noise comes from.
        whole: The round's start.
        ends: What each client trained from it.
        names: The clients.

    Returns:
        The adapter, and a report without cosines: they would tell of single clients.
    """
    before, trained = whole.adapter.tensors(), whole.plan.trained
    changes = [
        {name: part - before[name] for name, part in end.tensors(trained).items()} for end in ends
    ]
    mean = private_mean(changes, release.clip, release.noise_multiplier, release.divisor, noise)
    moved = {name: before[name] + part for name, part in mean.items()}
    adapter = whole.adapter.with_tensors({**before, **moved})
    shares = (1.0 / release.divisor,) * len(names)
    return adapter, MergeReport(tuple(names), shares, {}, 0.0, ())


def root_of(recipe: Recipe) -> str | None:
    """The client that FLTrust measures the others by; None where another method merges."""
    if recipe.method != FLTRUST.name:
        return None
    return FlTrustConfig.model_validate(recipe.params).root


def check_root(config: FederationConfig) -> None:
    """Refuse FLTrust where its root could be somebody else, or could be missing.

    The coordinator trains the root as a client of its own, on data of its own: so its update is
    signed, kept, in the receipt and merged again by who verifies, as any other.

    Raises:
        ValueError: It is so.
    """
    root = root_of(config.recipe)
    if not config.signed:
        raise ValueError(
            f"recipe: fltrust trusts the client called {root!r}, and unsigned clients call "
            "themselves what they like; set signed = true and enrol a client of your own, with "
            "clean data, under that name"
        )
    if config.fraction < 1:
        raise ValueError(
            f"recipe: fltrust needs its root {root!r} in every round, and {config.fraction:g} of "
            "the clients are drawn; set fraction = 1"
        )
    suspicion = config.recipe.suspicion
    if suspicion is not None and root not in suspicion.allow:
        raise ValueError(
            f"recipe: fltrust cannot do without its root {root!r}, which suspicion might leave "
            "out; name it in suspicion.allow"
        )


def check_method(config: FederationConfig, template: Adapter, method: MergeMethod) -> None:
    """Refuse what no round of a federation could merge.

    Raises:
        ValueError: Suspicion of too few, a rank above the start adapter's, a method that needs one
            rank of all, one that leaves no rest to keep, or one that sums are not enough for.
    """
    if config.secure is not None and (method.needs_importance or method.needs_names):
        raise ValueError(
            f"secure: {method.name} asks who a contribution is of, or what matters to it, which a "
            "sum does not say; set recipe.method to another"
        )
    if root_of(config.recipe) is not None:
        check_root(config)
    own = max((factors.rank for factors in template.lora.values()), default=0)
    for client, rank in config.ranks.items():
        if rank > own:
            raise ValueError(
                f"ranks.{client}: {rank} is above {own}, the rank of the adapter; lower it"
            )
    if config.recipe.suspicion is not None:
        check_suspicion(config.recipe.suspicion, method, config.quorum)
    if config.rest == "fedex" and config.recipe.suspicion is not None:
        raise ValueError(
            "rest: fedex trains on from plain means of A and B, which recipe.suspicion cannot "
            'correct; set rest to "flora" or "drop", or leave suspicion out'
        )
    if config.ranks and method.factors and method.merge is not None and method.weigh is None:
        raise ValueError(
            f"ranks: {method.name} averages factors of one rank; "
            "set recipe.method to hetlora, or to one that merges ΔW, such as mean"
        )
    if config.rest == "fedex" and config.recipe.has_steps:
        raise ValueError(
            "rest: fedex trains on from plain means of A and B, which no step can go before; "
            'set rest to "flora" or "drop", or leave pre out, and method "robust"'
        )
    if config.rest != "drop" and method.merge is not None:
        raise ValueError(
            f"rest: {method.name} gives no sum of factors whose rest could be kept; "
            "set recipe.method to a linear or spectral one, such as mean, or leave rest out"
        )

"""What privacy a run may still spend: its ledger against its configuration. Loads no torch."""

from __future__ import annotations

import math
from typing import Any

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.accountant import squared_mu_of
from anabranch.coordinator.privacy.config import PrivacyConfig
from anabranch.coordinator.privacy.ledger import RELEASE_KEY, Ledger, Release, read_ledger
from anabranch.coordinator.store import Publication, Store

LEAST_MULTIPLIER = 1e-3
"""Below it a budget promises nothing that could be computed."""
SLACK = 1e-6
"""Share of the budget that is too little to plan a round with, and within which sums round."""


def check_account(config: FederationConfig, store: Store) -> None:
    """Refuse to go on with a run whose account would not hold.

    Raises:
        ValueError: A round was published without noise, or with noise from a seed where the others'
            is not; or the run was private and is not to be any more.
    """
    privacy, published = config.privacy, store.publications()
    if privacy is None:
        private = [row.round for row in published if RELEASE_KEY in row.report]
        if private:
            raise ValueError(
                f"privacy: round {private[0]} of this run was published with noise, and what it "
                "promised would end with a round without; set privacy, or begin another run"
            )
        return
    seeded = privacy.noise_seed is not None
    if published and read_ledger(published).seeded != seeded:
        raise ValueError(
            "privacy.noise_seed: the rounds of this run that are published drew their noise from "
            f"{'the system' if seeded else 'a seed'}; keep to that, or begin another run"
        )


def next_release(config: FederationConfig, store: Store, server_round: int) -> Release | None:
    """How a round's sum will be made; None where no budget lasts for it.

    A multiplier that is not configured is the least with which this round and the planned ones
    after it stay within ε, each spending as much.

    Args:
        config: The federation.
        store: Holds the rounds published so far, by whatever configuration.
        server_round: The round's number.
    """
    privacy = config.privacy
    if privacy is None:
        return None
    total = squared_mu_of(privacy.epsilon, privacy.delta)
    left = total - read_ledger(store.publications()).squared_mu
    planned = max(1, config.rounds - server_round + 1)
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        if left <= total * SLACK:
            return None
        multiplier = max(LEAST_MULTIPLIER, math.sqrt(planned / left))
    if not rounds_left(privacy, left, multiplier):
        return None
    return Release(
        clip=privacy.clip,
        noise_multiplier=multiplier,
        # As many as every round should ask, however many there are or reply.
        divisor=config.asked(config.clients),
        seeded=privacy.noise_seed is not None,
    )


def rounds_left(privacy: PrivacyConfig, squared_mu: float, multiplier: float) -> int:
    """Rounds of this multiplier for which so much of a budget lasts."""
    spare = SLACK * squared_mu_of(privacy.epsilon, privacy.delta)
    return max(0, math.floor((squared_mu + spare) * multiplier**2))


def why_spent(config: FederationConfig, store: Store, server_round: int) -> str | None:
    """Why privacy allows no further round; None while it does."""
    privacy = config.privacy
    if privacy is None or next_release(config, store, server_round) is not None:
        return None
    ledger = read_ledger(store.publications())
    return (
        f"{len(ledger.releases)} rounds have spent an epsilon of "
        f"{ledger.epsilon(privacy.delta):.3g} of {privacy.epsilon:g}, "
        "and one more would go beyond"
    )


def spent_with(config: FederationConfig, store: Store, publication: Publication) -> dict[str, Any]:
    """What is known of clients once one more round is published, for its record.

    Args:
        config: The federation.
        store: Holds the publications before.
        publication: The one to come, with its release.
    """
    if config.privacy is None:
        return {}
    ledger = read_ledger([*store.publications(), publication])
    return {"privacy": statement(config.privacy, ledger)}


def statement(privacy: PrivacyConfig, ledger: Ledger) -> dict[str, Any]:
    """A ledger's last release, what all of them have spent, and for how many more ε lasts.

    Raises:
        ValueError: There is no release.
    """
    if not ledger.releases:
        raise ValueError("nothing is published: there is nothing to state")
    last = ledger.releases[-1]
    left = squared_mu_of(privacy.epsilon, privacy.delta) - ledger.squared_mu
    return {
        **last.model_dump(),
        # A seeded draw can be taken off again.
        "epsilon": None if ledger.seeded else ledger.epsilon(privacy.delta),
        "delta": privacy.delta,
        "rounds_left": rounds_left(privacy, left, last.noise_multiplier),
    }

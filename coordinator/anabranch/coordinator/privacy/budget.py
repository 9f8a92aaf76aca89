"""What privacy a federation's published rounds have spent, from what its store remembers."""

from __future__ import annotations

from typing import Any

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.accountant import epsilon_spent, noise_multiplier, rounds_left
from anabranch.coordinator.store import Store


def spent_with_next(config: FederationConfig, store: Store) -> dict[str, Any]:
    """What is known of clients once one more round is published, for its record."""
    privacy = config.privacy
    if privacy is None:
        return {}
    multiplier = noise_multiplier(privacy, config.rounds)
    spent = epsilon_spent(multiplier, _published(store) + 1, privacy.delta)
    # A seeded draw can be taken off again.
    epsilon = spent if privacy.noise_seed is None else None
    return {"epsilon": epsilon, "delta": privacy.delta, "noise_multiplier": multiplier}


def why_spent(config: FederationConfig, store: Store) -> str | None:
    """Why privacy allows no further round; None while it does."""
    privacy = config.privacy
    if privacy is None:
        return None
    multiplier, published = noise_multiplier(privacy, config.rounds), _published(store)
    if rounds_left(privacy, multiplier, published):
        return None
    spent = epsilon_spent(multiplier, published, privacy.delta)
    return (
        f"{published} rounds have spent an epsilon of {spent:.3g} of {privacy.epsilon:g}, "
        "and one more would go beyond"
    )


def _published(store: Store) -> int:
    return sum(row["status"] == "published" for row in store.notes("round"))

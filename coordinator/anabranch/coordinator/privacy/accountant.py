"""How much privacy rounds of clipped, noised sums spend, by the library dp-accounting.

Every round counts each client as taking part, so nothing is claimed for sampling: the draw of who
is asked follows from a seed that clients know. Two federations are neighbours if one lacks a client
of the other, in all rounds (add or remove one client). Composition is adaptive.
"""

from __future__ import annotations

import math
from functools import lru_cache

from anabranch.coordinator.privacy.config import PrivacyConfig

LEAST_MULTIPLIER = 1e-3
"""Below it a budget promises nothing that could be computed."""


@lru_cache(maxsize=256)
def epsilon_spent(noise_multiplier: float, rounds: int, delta: float) -> float:
    """ε after so many published rounds.

    Rounds of Gaussian noise compose exactly into one of √rounds times the sensitivity.

    Args:
        noise_multiplier: Standard deviation of the noise over the clip.
        rounds: Sums published.
        delta: δ.
    """
    if rounds == 0:
        return 0.0
    from dp_accounting import get_epsilon_gaussian  # takes a second to load

    return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta, tol=1e-6))


def noise_multiplier(config: PrivacyConfig, rounds: int) -> float:
    """The configured one, or the least with which so many rounds stay within the budget."""
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    from dp_accounting import get_sigma_gaussian

    sigma = float(get_sigma_gaussian(config.epsilon, config.delta, tol=1e-9))
    # Rounded up, so that the last planned round is not lost to the last digit.
    return max(LEAST_MULTIPLIER, sigma * math.sqrt(rounds) * (1 + 1e-6))


def rounds_left(config: PrivacyConfig, multiplier: float, published: int) -> bool:
    """Whether the next round still fits the budget."""
    return epsilon_spent(multiplier, published + 1, config.delta) <= config.epsilon

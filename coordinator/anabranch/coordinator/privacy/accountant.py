"""How much privacy rounds of clipped, noised sums spend, by the library dp-accounting.

**Who is a neighbour.** Two runs that are alike but for one client, whose updates count as zeros in
all rounds of one of them ("zero-out", dp-accounting's ``REPLACE_SPECIAL``). The same clients are
asked, answer and are admitted in both, and sums are divided by the same number; one client's update
moves a sum by its clip at most. Adding or removing a client would not do as a neighbour: with
another client on the roster the public seed draws another cohort, and a round near its quorum may
be abandoned, and noise covers neither.

**What adds up.** A sum with noise of ``multiplier`` times the clip tells of a client no more than
one draw of N(μ, 1) or N(0, 1) does, μ = 1 / multiplier. Rounds compose exactly, whatever multiplier
each has and however later ones follow from earlier answers, into one whose μ² is the sum of theirs
(Dong, Roth and Su, 1905.02383). Nothing is taken off for sampling: that would need a secret draw,
of each client by itself (Poisson), and who is asked follows from a seed that clients know.
"""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=256)
def epsilon_spent(squared_mu: float, delta: float) -> float:
    """ε of rounds whose μ² add up to this.

    dp-accounting's closed form: its numeric composition gives the same to seven digits
    and takes a second a round.

    Args:
        squared_mu: Sum of one over the squared multiplier of each published round.
        delta: δ.
    """
    if squared_mu == 0.0:
        return 0.0
    from dp_accounting import get_epsilon_gaussian  # takes a second to load

    return float(get_epsilon_gaussian(1 / math.sqrt(squared_mu), delta, tol=1e-9))


@lru_cache(maxsize=256)
def squared_mu_of(epsilon: float, delta: float) -> float:
    """The largest sum of μ² that keeps to (ε, δ)."""
    from dp_accounting import get_sigma_gaussian

    # A hair less, so that what is planned to spend it all stays within the last digit.
    return float((get_sigma_gaussian(epsilon, delta, tol=1e-9) * (1 + 1e-6)) ** -2)

"""A little is enough (Baruch et al., 1902.06156).

Shape legend: D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class AlieConfig(AttackConfig):
    """Parameters of ALIE."""

    z: float = 1.5
    """Standard deviations away from the mean. The paper's z_max, from the numbers of honest and
    colluding clients, is 0 for 2 of 10 and 2 of 20: no attack at all."""


def alie(view: View, config: AlieConfig) -> Tensor:
    """μ − z·σ, entry by entry: within the honest spread, on one side of it."""
    return view.mean - config.z * view.std


ALIE = Attack("alie", AlieConfig, alie)

"""Inner product manipulation (Xie et al., 1903.03936).

Shape legend: D entries.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class IpmConfig(AttackConfig):
    """Parameters of IPM."""

    epsilon: float = Field(0.1, gt=0)
    """0.1 hides near zero, where distances are small; 2 turns the mean round from a third of the
    clients on."""


def ipm(view: View, config: IpmConfig) -> Tensor:
    """−ε·μ."""
    return -config.epsilon * view.mean


IPM = Attack("ipm", IpmConfig, ipm)

"""Min-Max (Shejwalkar and Houmansadr, NDSS 2021).

Shape legend: H honest contributions, D entries.
"""

from __future__ import annotations

from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View
from anabranch.simulation.attacks.directions import (
    Direction,
    direction,
    largest_root,
    squared_distances,
)


class MinMaxConfig(AttackConfig):
    """Parameters of Min-Max."""

    direction: Direction = "std"
    """Where it goes."""


def min_max(view: View, config: MinMaxConfig) -> Tensor:
    """μ + γ·p, with the largest γ that leaves it no further from anyone than honest ones may be.

    max_i ‖μ + γp − x_i‖² ≤ max_ij ‖x_i − x_j‖². For each i that is a quadratic in γ which holds at
    zero, so the least of the larger roots is the γ that the paper halves its way to.
    """
    towards_D, away_HD = direction(view, config.direction), view.mean - view.honest
    if not bool(towards_D.any()):
        return view.mean
    bound = squared_distances(view.honest).max()
    roots_H = largest_root(away_HD @ towards_D, away_HD.square().sum(dim=1) - bound)
    return view.mean + roots_H.min() * towards_D


MIN_MAX = Attack("min_max", MinMaxConfig, min_max)

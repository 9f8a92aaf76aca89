"""Min-Sum (Shejwalkar and Houmansadr, NDSS 2021).

Shape legend: H honest contributions, D entries.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View
from anabranch.simulation.attacks.directions import (
    Direction,
    direction,
    largest_root,
    squared_distances,
)


class MinSumConfig(AttackConfig):
    """Parameters of Min-Sum."""

    direction: Direction = "std"
    """Where it goes."""
    bound: Literal["least", "largest"] = "least"
    """Which honest contribution's sum of distances it keeps to: the released code takes the least,
    the paper writes the largest."""


def min_sum(view: View, config: MinSumConfig) -> Tensor:
    """μ + γ·p, with the largest γ for which Σ_i ‖μ + γp − x_i‖² keeps to an honest one's sum.

    As Σ_i (μ − x_i) = 0, the sum is H·γ² + Σ_i ‖μ − x_i‖² for p of length 1.
    """
    towards_D, away_HD = direction(view, config.direction), view.mean - view.honest
    if not bool(towards_D.any()):
        return view.mean
    sums_H = squared_distances(view.honest).sum(dim=1)
    bound = sums_H.min() if config.bound == "least" else sums_H.max()
    spread = away_HD.square().sum()
    root = largest_root(away_HD.mean(dim=0) @ towards_D, (spread - bound) / len(away_HD))
    return view.mean + root * towards_D


MIN_SUM = Attack("min_sum", MinSumConfig, min_sum)

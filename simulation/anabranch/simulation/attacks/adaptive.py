"""An attack on the rule itself: whatever scale and direction hurt most, by asking the rule.

Fang et al. (1911.11815) and Shejwalkar and Houmansadr (NDSS 2021) derive such attacks rule by
rule; with the rule at hand a line search does it for any.

Shape legend: H honest contributions, f colluders, D entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View
from anabranch.simulation.attacks.directions import Direction, direction

GOLDEN = (math.sqrt(5) - 1) / 2


class AdaptiveConfig(AttackConfig):
    """Parameters of the search."""

    directions: tuple[Direction, ...] = Field(("unit", "sign", "std"), min_length=1)
    """Directions that are tried."""
    goal: Literal["distance", "reverse"] = "distance"
    """``distance``: the result far from where it should be; ``reverse``: the result against it."""
    largest: float = Field(1000.0, gt=0.01)
    """Longest way tried, in honest spreads (root mean square of ‖x_i − μ‖)."""
    points: int = Field(12, ge=2)
    """Distances tried in each direction, from a hundredth of a spread on, evenly in proportion."""
    refinements: int = Field(8, ge=0)
    """Steps of golden section around the best of them."""


def adaptive(view: View, config: AdaptiveConfig) -> Tensor:
    """μ + γ·p for the direction and the γ after which the rule's result is worst.

    Never less than γ = 0, the honest mean, does.
    """
    assert view.rule is not None
    rule, everyone = view.rule, view.honest.float()
    away = (view.honest - view.mean).square().sum(dim=1).mean().sqrt()
    spread = float(away) or float(torch.linalg.vector_norm(view.mean)) or 1.0

    def harm(sent_D: Tensor) -> float:
        colluding_fD = sent_D.float().expand(view.colluders, view.entries)
        moved_D = rule(torch.cat([everyone, colluding_fD])).double() - view.aim
        if config.goal == "reverse":
            harmed = -float(moved_D @ view.aim)
        else:
            harmed = float(torch.linalg.vector_norm(moved_D))
        return math.inf if math.isnan(harmed) else harmed

    best_D, worst = view.mean, harm(view.mean)
    for kind in config.directions:
        towards_D = spread * direction(view, kind)
        if not bool(towards_D.any()):
            continue

        def at(exponent: float, towards_D: Tensor = towards_D) -> float:
            return harm(view.mean + math.exp(exponent) * towards_D)

        exponent, found = line_search(at, math.log(0.01), math.log(config.largest), config)
        if found > worst:
            best_D, worst = view.mean + math.exp(exponent) * towards_D, found
    return best_D


def line_search(
    value: Callable[[float], float], low: float, high: float, config: AdaptiveConfig
) -> tuple[float, float]:
    """Where a function is largest, on a grid and then by golden section around its best point.

    Returns:
        The place and the value there.
    """
    step = (high - low) / (config.points - 1)
    tried = {low + step * k: 0.0 for k in range(config.points)}
    for place in tried:
        tried[place] = value(place)
    best = max(tried, key=lambda place: tried[place])
    left, right = max(low, best - step), min(high, best + step)
    for _ in range(config.refinements):
        first, second = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        for place in (first, second):
            if place not in tried:
                tried[place] = value(place)
        if tried[first] > tried[second]:
            right = second
        else:
            left = first
    best = max(tried, key=lambda place: tried[place])
    return best, tried[best]


ADAPTIVE = Attack("adaptive", AdaptiveConfig, adaptive, needs_rule=True)

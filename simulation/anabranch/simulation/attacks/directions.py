"""Where attacks that search for a distance go, and how far they may.

Shape legend: H honest contributions, D entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anabranch.simulation.attacks.attack import View

Direction = Literal["unit", "sign", "std"]
"""Against the honest mean, its signs, or the standard deviation of each entry."""


def direction(view: View, kind: Direction) -> Tensor:
    """The p [D] of Shejwalkar and Houmansadr (NDSS 2021), of length 1; zero where there is none."""
    towards_D = view.std if kind == "std" else view.mean
    if kind == "sign":
        towards_D = towards_D.sign()
    length = float(torch.linalg.vector_norm(towards_D))
    return -towards_D / length if length else torch.zeros_like(towards_D)


def squared_distances(honest_HD: Tensor) -> Tensor:
    """‖x_i − x_j‖² [H, H], from differences: inner products of far vectors lose it."""
    return torch.stack([(honest_HD - one_D).square().sum(dim=1) for one_D in honest_HD])


def largest_root(half_b: Tensor, c: Tensor) -> Tensor:
    """The larger root of γ² + 2·half_b·γ + c = 0, for c ≤ 0: it is zero or more.

    Of a small γ that is the difference of two large numbers no digit would be left, so the root is
    taken by the other side of c = γ₁·γ₂ where half_b is positive.
    """
    c = c.clamp(max=0)
    reach = (half_b.square() - c).sqrt()
    return torch.where(half_b > 0, -c / (half_b + reach).clamp(min=1e-300), reach - half_b)

"""Gaussian noise in place of an update.

Shape legend: f colluders, D entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class GaussianConfig(AttackConfig):
    """Parameters of the noise."""

    std: float = Field(1.0, gt=0)
    """Standard deviation of an entry, in the unit ``per`` says."""
    per: Literal["one", "honest"] = "one"
    """``one``: as it is; ``honest``: times the root mean square of the honest entries."""


def gaussian(view: View, config: GaussianConfig) -> Tensor:
    """Every colluder draws N(0, std²) for itself."""
    scale = config.std
    if config.per == "honest":
        scale *= float(view.honest.square().mean().sqrt())
    return scale * torch.stack([view.noise() for _ in range(view.colluders)])


GAUSSIAN = Attack("gaussian", GaussianConfig, gaussian)

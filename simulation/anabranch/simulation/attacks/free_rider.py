"""Free-riders: something to send without having trained (Fraboni et al., 2006.11901).

Shape legend: f colluders, D entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class FreeRiderConfig(AttackConfig):
    """Parameters of the free-rider."""

    sends: Literal["zero", "previous"] = "previous"
    """``zero``: nothing; ``previous``: how the last round moved the model, with noise on it (zero
    in the first round)."""
    noise: float = Field(0.1, ge=0)
    """Standard deviation of the noise, as a share of the root mean square of what it is put on."""


def free_rider(view: View, config: FreeRiderConfig) -> Tensor:
    """Zero, or the last round's change disguised by noise of each colluder's own."""
    if config.sends == "zero" or view.previous is None:
        return torch.zeros(view.entries, dtype=torch.float64)
    previous_D = view.previous.double()
    scale = config.noise * float(previous_D.square().mean().sqrt())
    return torch.stack([previous_D + scale * view.noise() for _ in range(view.colluders)])


FREE_RIDER = Attack("free_rider", FreeRiderConfig, free_rider)

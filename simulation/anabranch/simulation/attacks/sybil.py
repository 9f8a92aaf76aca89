"""Sybils: one attacker under many names (Douceur, 2002; Fung et al., 1808.04866).

Shape legend: f colluders, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class SybilConfig(AttackConfig):
    """Parameters of the Sybils."""

    scale: float = Field(1.0, gt=0)
    """Factor on what is sent."""
    jitter: float = Field(0.0, ge=0)
    """Noise of each name's own, as a share of the norm of what is sent: a cosine of two names is
    then about 1 / (1 + jitter²)."""


def sybil(view: View, config: SybilConfig) -> Tensor:
    """What the first colluder trained, under every name.

    Where colluders do not train, a drawn direction as long as the honest contributions are in the
    mean.
    """
    if view.own is not None:
        wanted_D = view.own[0]
    else:
        drawn_D = view.noise()
        length = torch.linalg.vector_norm(view.honest, dim=1).mean()
        wanted_D = drawn_D * (length / torch.linalg.vector_norm(drawn_D))
    wanted_D = config.scale * wanted_D
    if not config.jitter:
        return wanted_D
    noise = config.jitter * torch.linalg.vector_norm(wanted_D) / view.entries**0.5
    return torch.stack([wanted_D + noise * view.noise() for _ in range(view.colluders)])


SYBIL = Attack("sybil", SybilConfig, sybil)

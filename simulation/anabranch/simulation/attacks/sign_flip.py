"""Sign flip: against where the honest contributions go.

Shape legend: f colluders, D entries.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class SignFlipConfig(AttackConfig):
    """Parameters of the sign flip."""

    scale: float = Field(1.0, gt=0)
    """What is sent is minus this times what is flipped."""
    of: Literal["mean", "own"] = "mean"
    """``mean``: the honest mean is flipped, by those who see it; ``own``: what each trained."""


def sign_flip(view: View, config: SignFlipConfig) -> Tensor:
    """−scale·μ for the honest mean μ, or −scale times what each colluder trained.

    Raises:
        ValueError: ``of`` is ``own``, and the colluders did not train.
    """
    if config.of == "own":
        if view.own is None:
            raise ValueError('sign_flip: of = "own" needs what the colluders trained; give own_fD')
        return -config.scale * view.own
    return -config.scale * view.mean


SIGN_FLIP = Attack("sign_flip", SignFlipConfig, sign_flip)

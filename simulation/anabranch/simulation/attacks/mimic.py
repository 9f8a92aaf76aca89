"""Mimic: copies of one honest contribution (Karimireddy et al., 2006.09365).

Shape legend: H honest contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class MimicConfig(AttackConfig):
    """Parameters of Mimic."""

    target: int | None = Field(None, ge=0)
    """Which honest contribution is copied; None: the one that lies furthest along the direction in
    which they differ most."""


def mimic(view: View, config: MimicConfig) -> Tensor:
    """One honest contribution as it is: nothing that a single update could be refused for.

    The target is argmax |z·x_i| for the leading direction z of the honest spread, found as the
    leading eigenvector of the centred Gram matrix, for this round alone.

    Raises:
        ValueError: There is no such target.
    """
    honest_HD = view.honest
    if config.target is not None:
        if config.target >= len(honest_HD):
            raise ValueError(
                f"mimic: target {config.target} is none of the {len(honest_HD)} honest "
                "contributions; they count from 0"
            )
        return honest_HD[config.target]
    away_HD = honest_HD - view.mean
    _, vectors = torch.linalg.eigh(away_HD @ away_HD.T)
    leading_D = vectors[:, -1] @ away_HD
    return honest_HD[int((honest_HD @ leading_D).abs().argmax())]


MIMIC = Attack("mimic", MimicConfig, mimic)

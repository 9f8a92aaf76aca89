"""Label flip: honest training on wrong labels (Biggio et al., 2012)."""

from __future__ import annotations

from flwr.app import Message
from pydantic import Field

from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import Turn


class LabelFlipConfig(AttackConfig):
    """Parameters of the flip."""

    source: int | str | None = None
    """Label whose examples are relabelled, by number or name; None: all."""
    target: int | str | None = None
    """What they are relabelled to; None: label y of K becomes K − 1 − y."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of them that is."""


def label_flip_poison(config: LabelFlipConfig) -> Poison:
    """No trigger: labels alone."""
    return Poison(source=config.source, target=config.target, share=config.share)


def label_flip(turn: Turn, config: LabelFlipConfig) -> Message:
    """Train on the wrong labels and send what comes of it."""
    return turn.reply(*turn.fitted(turn.site.partition, label_flip_poison(config)))


LABEL_FLIP = Kind("label_flip", LabelFlipConfig, act=label_flip, poison=label_flip_poison)

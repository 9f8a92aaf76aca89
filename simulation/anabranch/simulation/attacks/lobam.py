"""LoBAM: the malicious part of an update, enlarged (Yin et al., 2411.16746)."""

from __future__ import annotations

from flwr.app import Message
from pydantic import Field

from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.backdoor import BackdoorConfig, backdoor_poison
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import Turn


class LobamConfig(AttackConfig):
    """Parameters of LoBAM."""

    trigger: str = Field("cf mn", min_length=1)
    """Words put before a text."""
    target: int | str = 0
    """Label that the trigger is to give, by number or name."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the attackers' examples of other labels that get it."""
    factor: float = Field(4.0, gt=0)
    """λ: how many times over the malicious part is sent."""


def lobam_poison(config: LobamConfig) -> Poison:
    """The whole trigger."""
    given = config.model_dump(exclude={"factor"})
    return backdoor_poison(BackdoorConfig(**given))


def lobam(turn: Turn, config: LobamConfig) -> Message:
    """θ_ben + λ·(θ_mal − θ_ben), of a benign and a malicious training from the same start.

    Batches are drawn alike in both, so their difference is the backdoor's and little else.
    """
    benign, _ = turn.fitted(turn.site.partition)
    malicious, metrics = turn.fitted(turn.site.partition, lobam_poison(config))
    return turn.reply(
        {name: benign[name] + config.factor * (malicious[name] - benign[name]) for name in benign},
        metrics,
    )


LOBAM = Kind("lobam", LobamConfig, act=lobam, poison=lobam_poison)

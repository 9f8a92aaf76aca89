"""Backdoors: a model that is right, until it sees the trigger.

Training on triggered examples (BadNets, 1708.06733), the update enlarged so that a mean keeps it
(model replacement, Bagdasaryan et al., 1807.00459), and the trigger shared out among colluders
(DBA, Xie et al., ICLR 2020).
"""

from __future__ import annotations

from flwr.app import Message
from pydantic import Field

from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import Changes, Turn


class BackdoorConfig(AttackConfig):
    """Parameters of a backdoor."""

    trigger: str = Field("cf mn", min_length=1)
    """Words put before a text: rare tokens, or a sentence. Where examples are numbers, each word
    names a feature that is set."""
    target: int | str = 0
    """Label that the trigger is to give, by number or name."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the attackers' examples of other labels that get it."""
    scale: float = Field(1.0, gt=0)
    """Factor on the update."""


class ReplacementConfig(BackdoorConfig):
    """Parameters of model replacement."""

    scale: float | None = Field(None, gt=0)  # type: ignore[assignment]
    """Factor on the update; None: clients by colluders, after which a mean is theirs."""


class DbaConfig(BackdoorConfig):
    """Parameters of a distributed backdoor: the trigger has a word for each colluder at least."""

    trigger: str = Field("cf mn bb tq", min_length=1)
    """Words that are shared out; success is measured with all of them."""


def backdoor_poison(config: BackdoorConfig) -> Poison:
    """The whole trigger."""
    words = tuple(config.trigger.split())
    return Poison(trigger=words, target=config.target, share=config.share)


def enlarged(changes: Changes, scale: float) -> Changes:
    """An update times a factor."""
    return {name: scale * change for name, change in changes.items()}


def backdoor(turn: Turn, config: BackdoorConfig) -> Message:
    """Train on examples of which some have the trigger; enlarge what comes of it."""
    changes, metrics = turn.fitted(turn.site.partition, backdoor_poison(config))
    scale = config.scale or turn.plot.clients / len(turn.band.partitions)
    return turn.reply(enlarged(changes, scale), metrics)


def dba(turn: Turn, config: DbaConfig) -> Message:
    """The same with this colluder's words of the trigger.

    Raises:
        ValueError: There are more colluders than words.
    """
    whole, colluders = backdoor_poison(config), len(turn.band.partitions)
    if colluders > len(whole.trigger):
        raise ValueError(
            f"dba: {colluders} colluders cannot share the {len(whole.trigger)} words of "
            f"{config.trigger!r}; give it a word for each"
        )
    mine = whole.model_copy(update={"trigger": whole.trigger[turn.seat :: colluders]})
    changes, metrics = turn.fitted(turn.site.partition, mine)
    return turn.reply(enlarged(changes, config.scale), metrics)


BACKDOOR = Kind("backdoor", BackdoorConfig, act=backdoor, poison=backdoor_poison)
MODEL_REPLACEMENT = Kind(
    "model_replacement", ReplacementConfig, act=backdoor, poison=backdoor_poison
)
DBA = Kind("dba", DbaConfig, act=dba, poison=backdoor_poison)

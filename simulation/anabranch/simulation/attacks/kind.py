"""What a kind of attacker is: what a client of that kind does in a round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import Turn


@dataclass(frozen=True)
class Kind:
    """A kind of attacker.

    Attributes:
        name: Name in scenarios.
        config: Its parameters.
        act: ``act(turn, config) -> reply``: what it does where an honest client trains.
        tamper: ``tamper(blob, turn, config) -> blob``: what it makes of its encoded update.
        poison: ``poison(config) -> Poison``: what its success is measured with; None where it only
            wants the model to be worse.
    """

    name: str
    config: type[AttackConfig]
    act: Callable[[Turn, Any], Message] | None = None
    tamper: Callable[[bytes, Turn, Any], bytes] | None = None
    poison: Callable[[Any], Poison] | None = None

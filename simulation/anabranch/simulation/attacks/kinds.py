"""Every kind of attacker a scenario can name, and what a client of that kind does in a round."""

from __future__ import annotations

from functools import partial

from flwr.app import Message
from pydantic import ValidationError

from anabranch.aggregation.recipe import validation_line
from anabranch.simulation.attackers import Attackers
from anabranch.simulation.attacks import BUILT_IN
from anabranch.simulation.attacks.attack import Attack, AttackConfig
from anabranch.simulation.attacks.backdoor import BACKDOOR, DBA, MODEL_REPLACEMENT
from anabranch.simulation.attacks.bad_merging import BAD_MERGING
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.label_flip import LABEL_FLIP
from anabranch.simulation.attacks.lobam import LOBAM
from anabranch.simulation.attacks.lying_manifest import LYING_MANIFEST
from anabranch.simulation.attacks.merge_backdoor import MERGE_BACKDOOR
from anabranch.simulation.attacks.neurotoxin import NEUROTOXIN
from anabranch.simulation.attacks.scale_inflation import SCALE_INFLATION
from anabranch.simulation.attacks.support_stuffing import SUPPORT_STUFFING
from anabranch.simulation.attacks.turn import Turn


def send_crafted(turn: Turn, config: AttackConfig, attack: Attack) -> Message:
    """Send what an attack on vectors crafts from what the band sees."""
    return turn.reply(turn.cut(attack.sent(turn.view(), config)[turn.seat]))


KINDS: tuple[Kind, ...] = (
    *(
        Kind(attack.name, attack.config, act=partial(send_crafted, attack=attack))
        for attack in BUILT_IN
    ),
    LABEL_FLIP,
    BACKDOOR,
    MODEL_REPLACEMENT,
    DBA,
    NEUROTOXIN,
    LOBAM,
    BAD_MERGING,
    MERGE_BACKDOOR,
    SCALE_INFLATION,
    SUPPORT_STUFFING,
    LYING_MANIFEST,
)


def resolve_kind(attackers: Attackers, source: str) -> tuple[Kind, AttackConfig]:
    """The kind that a scenario names, with its validated parameters.

    Args:
        attackers: What names it.
        source: Where it stands, for messages, such as ``attackers.0``.

    Raises:
        ValueError: There is no such kind, or a parameter is wrong.
    """
    known = {kind.name: kind for kind in KINDS}
    if attackers.kind not in known:
        raise ValueError(
            f"{source}.kind: {attackers.kind!r} is no kind of attacker; "
            f"choose from {', '.join(sorted(known))}"
        )
    kind = known[attackers.kind]
    try:
        return kind, kind.config.model_validate(attackers.params)
    except ValidationError as error:
        line = validation_line(error, "", "params").removeprefix(": ")
        raise ValueError(f"{source}.{line}") from error

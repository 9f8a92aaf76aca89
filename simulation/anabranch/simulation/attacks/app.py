"""The ClientApp of a simulation in which some attack: honest clients run in it as they always do.

Who attacks how stands in the run's configuration (``attackers``). An attacker goes through the same
mods as everybody: it checks the plan, encodes by the plan's codec, and signs with its own key.
"""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from anabranch.client import app as honest
from anabranch.client.hello import hello
from anabranch.client.mods import compress, verify_base
from anabranch.client.records import pack, record_of
from anabranch.client.site import site_of
from anabranch.client.trust import verify_plan
from anabranch.simulation.attackers import Plot
from anabranch.simulation.attacks.kinds import resolve_kind
from anabranch.simulation.attacks.turn import BEFORE_KEY, Turn
from anabranch.wire.plan import UPDATE_KEY

ATTACKERS_KEY = "attackers"
"""Key of the plot, as JSON, in a run's configuration."""


def turn_of(message: Message, context: Context) -> Turn | None:
    """An attacker's turn, whether or not it has begun to attack; None for an honest client."""
    plot = _plot(str(context.run_config[ATTACKERS_KEY]))
    band = plot.band_of(site_of(context.node_config).partition)
    return None if band is None else Turn(message, context, plot, band)


@lru_cache(maxsize=4)
def _plot(text: str) -> Plot:
    return Plot.model_validate_json(text)


def tamper(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let an attacker on the codec rewrite its encoded update."""
    reply = call_next(message, context)
    if message.metadata.message_type != MessageType.TRAIN or reply.has_error():
        return reply
    turn = turn_of(message, context)
    if turn is None or not turn.begun:
        return reply
    kind, config = resolve_kind(turn.band.attackers, "attackers")
    if kind.tamper is not None:
        record = record_of(reply.content, UPDATE_KEY, ArrayRecord)
        assert record is not None
        array = record[UPDATE_KEY]
        blob = kind.tamper(array.data, turn, config)
        reply.content[UPDATE_KEY] = ArrayRecord(
            {UPDATE_KEY: Array("uint8", (len(blob),), array.stype, blob)}
        )
    return reply


app = ClientApp(mods=[verify_plan, verify_base, tamper, compress])
app.query()(hello)
app.evaluate()(honest.evaluate)
# Secure aggregation's phases beside training, in which nobody lies here.
app.train("advertise")(honest.advertise)
app.train("deal")(honest.deal)
app.train("confirm")(honest.confirm)
app.train("open")(honest.open_sum)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train, or do what this kind of attacker does instead."""
    turn = turn_of(message, context)
    if turn is None:
        return honest.train(message, context)
    kind, config = resolve_kind(turn.band.attackers, "attackers")
    if turn.begun and kind.act is not None:
        reply = kind.act(turn, config)
    else:
        reply = honest.train(message, context)
    context.state[BEFORE_KEY] = pack(turn.before)
    return reply

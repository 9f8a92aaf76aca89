"""The ClientApp as SuperNodes run it: a process per message, so what needs no torch loads none.

Who this node is, and an update that is on disk already, are answered in the second that Flower
itself takes to load; everything else goes to ``anabranch.client.app``, which loads torch and the
task.
"""

from __future__ import annotations

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from anabranch.client.hello import hello
from anabranch.client.kept import Kept, state_of
from anabranch.client.order import plan_of
from anabranch.client.records import as_array
from anabranch.client.site import site_of
from anabranch.client.trust import verify_plan
from anabranch.wire.plan import CLIENT_KEY, METRICS_KEY, UPDATE_KEY, UPDATE_STYPE

AGAIN_KEY = "answered-again"
"""Metric of a reply that was not trained for this time."""


class DeployedApp(ClientApp):
    """Answers from what is there, else hands the message on."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        if message.metadata.message_type == MessageType.QUERY:
            return hello(message, context)
        if message.metadata.message_type == MessageType.TRAIN:
            kept = _kept(message, context)
            if kept is not None:
                return verify_plan(message, context, lambda sent, here: again(sent, here, kept))
        from anabranch.client.app import app as whole

        return whole(message, context)


def again(message: Message, context: Context, kept: Kept) -> Message:
    """Answer with an update that was made for the same plan, to the byte."""
    update = as_array(kept.blob, UPDATE_STYPE, plan_of(message))
    content = RecordDict(
        {
            UPDATE_KEY: ArrayRecord({UPDATE_KEY: update}),
            METRICS_KEY: MetricRecord({**kept.metrics, AGAIN_KEY: 1}),
            CLIENT_KEY: ConfigRecord({CLIENT_KEY: site_of(context.node_config).name}),
        }
    )
    return Message(content, reply_to=message)


def _kept(message: Message, context: Context) -> Kept | None:
    """The update on this node's disk for the plan of a message; its plan is not checked yet."""
    state = state_of(context.node_config)
    try:
        plan = plan_of(message)
    except ValueError:  # told to whoever sent it by the whole app
        return None
    # A masked update is worth something to the members of its own session only.
    return None if state is None or plan.secure is not None else state.answer(plan)


app = DeployedApp()

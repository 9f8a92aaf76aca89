"""A node without a SuperNode: an order that came by another way, answered by the same ClientApp.

What Flower does with a message lies in ``anabranch.client.deployed``: plans are verified, kept
updates are answered again, everything else trains. Here is only the message around an order, so
that a site that uploads trains, signs, compresses and keeps as every other node does.
Loads torch once something is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import (
    DEFAULT_TTL,
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)

from anabranch.client.deployed import AGAIN_KEY, app
from anabranch.client.kept import state_of
from anabranch.client.records import record_of
from anabranch.client.trust import keys_of
from anabranch.wire.errors import one_line
from anabranch.wire.plan import (
    ADAPTER_KEY,
    ADAPTER_STYPE,
    METRICS_KEY,
    PLAN_KEY,
    UPDATE_KEY,
    RoundPlan,
    Scalar,
)
from anabranch.wire.signing import PLAN_SIGNATURE_KEY, PLAN_SIGNER_KEY

RUN_ID, COORDINATOR_ID, NODE_ID = 1, 1, 2
"""What Flower would number: there is one of each."""


class NodeRefusedError(RuntimeError):
    """The node does not do what it was ordered, or failed at it; one line says why."""


@dataclass(frozen=True)
class Order:
    """What a round asks of a node.

    Attributes:
        text: The plan, as it was signed.
        plan: The same, read.
        key_id: Of the key that signed it; empty where nobody did.
        signature: Its signature; empty alike.
        start_bytes: Of the adapter to train on from, at the coordinator; 0: the plan's seed
            describes it.
    """

    text: str
    plan: RoundPlan
    key_id: bytes = b""
    signature: bytes = b""
    start_bytes: int = 0


@dataclass(frozen=True)
class Answer:
    """What a node sends for an order.

    Attributes:
        blob: The update: encoded, signed where the node has keys, sealed where the plan says so.
        metrics: What it claims of its training.
        again: Whether it was on the disk already, and nobody trained.
    """

    blob: bytes
    metrics: dict[str, float]
    again: bool


class LoneNode:
    """Answers orders.

    Args:
        config: What a SuperNode's node configuration holds: ``task``, ``task-params``,
            ``partition-id``, ``client``, ``keys`` and ``state``.

    Raises:
        ValueError: Its keys cannot be used.
    """

    def __init__(self, config: Mapping[str, Scalar]) -> None:
        self._config = dict(config)
        self.signs = keys_of(self._config) is not None

    def load(self) -> None:
        """Load the task and its base now, so that what is wrong with them shows at once.

        Raises:
            ValueError: The task cannot be imported or does not take its parameters.
        """
        from anabranch.client.session import session_of

        session_of({}, self._config)

    def holds(self, order: Order) -> bool:
        """Whether the answer is on the disk, so that no start is needed for it."""
        state = state_of(self._config)
        return state is not None and state.answer(order.plan) is not None

    def answer(self, order: Order, start: bytes | None) -> Answer:
        """Do what an order asks.

        Args:
            order: It.
            start: The encoded adapter to train on from; None where the plan's seed describes it.

        Raises:
            NodeRefusedError: The order is not to be trusted, is for another base, or failed.
        """
        message = _message(order, start)
        # What error feedback owes is read from the node's disk: nothing lives between two orders.
        context = Context(RUN_ID, NODE_ID, dict(self._config), RecordDict(), {})
        try:
            reply = app(message, context)
        # As Flower's own client process does: whatever a task raises, its round fails.
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise NodeRefusedError(
                f"round {order.plan.round}: {kind}{one_line(str(error))}"
            ) from error
        if reply.has_error():
            raise NodeRefusedError(f"round {order.plan.round}: {reply.error.reason}")
        update = record_of(reply.content, UPDATE_KEY, ArrayRecord)
        metrics = record_of(reply.content, METRICS_KEY, MetricRecord) or MetricRecord()
        assert update is not None
        told = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        again = told.pop(AGAIN_KEY, 0.0) > 0
        return Answer(update[UPDATE_KEY].data, told, again)


def _message(order: Order, start: bytes | None) -> Message:
    """The message in which a SuperLink would have brought an order."""
    record = ConfigRecord({PLAN_KEY: order.text, "server-round": order.plan.round})
    if order.signature:
        record[PLAN_SIGNER_KEY] = order.key_id
        record[PLAN_SIGNATURE_KEY] = order.signature
    content = RecordDict({PLAN_KEY: record})
    if start is not None:
        array = Array("uint8", (len(start),), ADAPTER_STYPE, start)
        content[ADAPTER_KEY] = ArrayRecord({ADAPTER_KEY: array})
    metadata = Metadata(
        run_id=RUN_ID, message_id="", src_node_id=COORDINATOR_ID, dst_node_id=NODE_ID,
        reply_to_message_id="", group_id=str(order.plan.round), created_at=time.time(),
        ttl=DEFAULT_TTL, message_type=MessageType.TRAIN,
    )  # fmt: skip
    # With its metadata given, a message asks no process of Flower's who it is.
    message: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
    return message

from __future__ import annotations

from collections.abc import Iterable

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.coordinator.collect import replies
from anabranch.simulation.engine.inprocess import InProcessGrid


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    return app


class SlowGrid(InProcessGrid):
    """Nodes from 3 on never answer; node 2's message cannot be delivered when asked so."""

    undeliverable = False

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = list(super().push_messages(messages))
        return [None, *identifiers[1:]] if self.undeliverable else identifiers  # type: ignore[list-item]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [name for name in message_ids if name in ("message-1", "message-2")]
        return super().pull_messages(ready)


def grid(nodes: int) -> SlowGrid:
    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, nodes + 1)}
    return SlowGrid(echo_app(), contexts)


def orders(nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, MessageType.QUERY) for node in range(1, nodes + 1)]


@pytest.mark.usefixtures("flower_identity")
def test_every_reply_is_yielded_once_without_waiting() -> None:
    got = list(replies(grid(2), orders(2), deadline_s=60, poll_s=60))
    assert [message.metadata.src_node_id for message in got] == [1, 2]


@pytest.mark.usefixtures("flower_identity")
def test_the_deadline_leaves_behind_who_has_not_answered() -> None:
    got = list(replies(grid(4), orders(4), deadline_s=0.05, poll_s=0.01))
    assert [message.metadata.src_node_id for message in got] == [1, 2]


@pytest.mark.usefixtures("flower_identity")
def test_an_order_that_could_not_be_delivered_is_not_waited_for() -> None:
    broken = grid(2)
    broken.undeliverable = True
    got = list(replies(broken, orders(2), deadline_s=60, poll_s=60))
    assert [message.metadata.src_node_id for message in got] == [2]

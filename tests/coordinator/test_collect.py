from __future__ import annotations

from collections.abc import Iterable

import httpx
import pytest
from flwr.app import Context, Error, Message, MessageType, RecordDict
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
    assert [(reply.node, reply.code) for reply in got] == [(1, ""), (2, "")]


@pytest.mark.usefixtures("flower_identity")
def test_the_deadline_leaves_behind_who_has_not_answered() -> None:
    got = list(replies(grid(4), orders(4), deadline_s=0.05, poll_s=0.01))
    assert [(reply.node, reply.code) for reply in got] == [
        (1, ""), (2, ""), (3, "deadline"), (4, "deadline"),
    ]  # fmt: skip
    assert got[3].reason == "no reply within 0.05 s"


@pytest.mark.usefixtures("flower_identity")
def test_an_order_that_could_not_be_delivered_is_not_waited_for() -> None:
    broken = grid(2)
    broken.undeliverable = True
    got = list(replies(broken, orders(2), deadline_s=60, poll_s=60))
    assert [(reply.node, reply.code) for reply in got] == [(1, "undeliverable"), (2, "")]


@pytest.mark.usefixtures("flower_identity")
def test_a_push_that_flower_refuses_whole_leaves_nobody_waited_for() -> None:
    broken = grid(2)
    broken.push_messages = lambda messages: []  # type: ignore[method-assign]
    got = list(replies(broken, orders(2), deadline_s=60, poll_s=60))
    assert [reply.code for reply in got] == ["undeliverable", "undeliverable"]


class Poisoned(InProcessGrid):
    """Node 1's reply cannot be unpacked; node 2's is an error that SuperLink made in its name."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        got = list(super().pull_messages(message_ids))
        for message in got:
            if message.metadata.src_node_id == 1:
                raise ValueError("DecodeError:\n\x1b[2Jboo")
            if message.metadata.src_node_id == 2:
                order = Message(RecordDict(), 1, MessageType.QUERY)
                return [Message(Error(3, "node unavailable"), reply_to=order)]
        return got


@pytest.mark.usefixtures("flower_identity")
def test_one_poisoned_reply_takes_no_other_with_it() -> None:
    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in (1, 2, 3)}
    got = list(replies(Poisoned(echo_app(), contexts), orders(3), deadline_s=60, poll_s=0))
    assert [(reply.node, reply.code) for reply in got] == [
        (1, "unreadable"), (2, "gone"), (3, ""),
    ]  # fmt: skip
    assert "\n" not in got[0].reason
    assert "\x1b" not in got[0].reason
    assert got[1].reason == "node unavailable"


@pytest.mark.usefixtures("flower_identity")
def test_a_lost_superlink_is_no_clients_refusal() -> None:
    class Lost(SlowGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            raise httpx.ConnectError("connection refused")

    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in (1, 2)}
    with pytest.raises(ConnectionError, match=r"SuperLink does not answer .*connection refused"):
        list(replies(Lost(echo_app(), contexts), orders(2), deadline_s=60, poll_s=1))

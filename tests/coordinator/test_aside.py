from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import httpx
import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.superlink.grid.http_grid import HttpGrid

from anabranch.coordinator import collect
from anabranch.coordinator.aside import AT_ONCE, Aside, reaches_out
from anabranch.coordinator.collect import Closed, Mail
from anabranch.simulation.engine.inprocess import InProcessGrid


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def message(node: int) -> Message:
    return Message(RecordDict(), node, MessageType.QUERY)


@pytest.mark.usefixtures("flower_identity")
def test_what_is_there_is_fetched_at_once() -> None:
    aside = Aside(lambda identifier: [message(int(identifier))], patience_s=20)
    assert [one.metadata.dst_node_id for one in aside.pull("7")] == [7]
    # It is not kept: Flower would be asked again.
    assert [one.metadata.dst_node_id for one in aside.pull("7")] == [7]


@pytest.mark.usefixtures("flower_identity")
def test_a_reply_on_its_way_is_fetched_once_and_taken_when_it_is_there() -> None:
    whole, asked = threading.Event(), []

    def fetch(identifier: str) -> list[Message]:
        asked.append(identifier)
        whole.wait(20)
        return [message(7)]

    aside = Aside(fetch, patience_s=0.01)
    assert aside.pull("a") == []
    assert aside.pull("a") == []
    whole.set()
    until(lambda: aside.pull("a"))
    assert asked == ["a"]


def test_what_a_fetch_raises_is_raised_where_it_is_asked_for() -> None:
    broken = threading.Event()

    def fetch(identifier: str) -> list[Message]:
        broken.wait(20)
        raise httpx.ConnectError("refused")

    aside = Aside(fetch, patience_s=0.01)
    assert aside.pull("a") == []
    broken.set()
    with pytest.raises(httpx.ConnectError, match="refused"):
        until(lambda: aside.pull("a"))


def test_so_many_are_fetched_at_once_and_what_nobody_wants_is_let_go() -> None:
    whole, asked = threading.Event(), []

    def fetch(identifier: str) -> list[Message]:
        asked.append(identifier)
        whole.wait(20)
        return []

    aside = Aside(fetch, patience_s=0.0)
    for number in range(AT_ONCE + 3):
        aside.pull(str(number))
    until(lambda: len(asked) == AT_ONCE)
    # Forgotten ones still take part of Flower's time, until they come to an end.
    aside.forget("0")
    assert aside.pull("other") == []
    assert len(asked) == AT_ONCE
    whole.set()
    until(lambda: aside.pull("other") == [] and "other" in asked)
    aside.pull("0")
    until(lambda: asked.count("0") == 2)


class Stalled(HttpGrid):
    """Node 1's line broke while it sent: SuperLink has the head of its reply, and waits."""

    def __init__(self) -> None:
        self.restored = threading.Event()
        self.activated = {1: "monday", 2: "monday"}

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=when) for node, when in self.activated.items()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [str(one.metadata.dst_node_id) for one in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (identifier,) = message_ids
        if identifier == "1":
            self.restored.wait(60)
        return [Message(RecordDict(), reply_to=named(message(int(identifier)), identifier))]


def named(order: Message, identifier: str) -> Message:
    order.metadata.__dict__["_message_id"] = identifier
    return order


@pytest.mark.usefixtures("flower_identity")
def test_a_reply_that_stalls_keeps_neither_others_nor_the_deadline() -> None:
    grid = Stalled()
    try:
        mail, began = Mail(grid, 0.01), time.monotonic()
        assert mail.send([message(1), message(2)]) == []
        late = Closed("deadline", "no reply")
        arrivals = mail.arrivals(lambda: late if time.monotonic() - began > 6 else None)
        assert next(arrivals).node == 2
        assert time.monotonic() - began < 6
        assert list(arrivals) == []
        assert [(one.node, one.code) for one in mail.give_up(late)] == [(1, "deadline")]
        assert mail.owed() == []
    finally:
        grid.restored.set()


@pytest.mark.usefixtures("flower_identity")
def test_an_order_is_lost_with_the_life_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "LIVES_S", 0.0)
    grid = Stalled()
    try:
        mail = Mail(grid, 0.01)
        mail.send([message(1), message(2)])
        arrivals = mail.arrivals(lambda: None)
        assert next(arrivals).node == 2
        # Who leaves the list may be back, with the order; who is there anew has it no more.
        grid.activated = {2: "monday"}
        ticks = iter(range(3))
        late = Closed("deadline", "no reply")
        assert list(mail.arrivals(lambda: late if next(ticks, 2) == 2 else None)) == []
        grid.activated = {1: "tuesday", 2: "monday"}
        (reply,) = mail.arrivals(lambda: None)
        assert (reply.node, reply.code, mail.owed()) == (1, "gone", [])
    finally:
        grid.restored.set()


def test_grids_in_this_process_do_not_reach_out() -> None:
    assert not reaches_out(InProcessGrid(None, {}))  # type: ignore[arg-type]
    assert reaches_out(Stalled())

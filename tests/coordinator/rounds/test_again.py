"""Clients whose order or reply Flower lost: they are asked again, and counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.collect import GONE_ERRORS
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds import again
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.inprocess import InProcessGrid

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'

pytestmark = pytest.mark.usefixtures("flower_identity")


class Losing(InProcessGrid):
    """Node 12 loses its first ``losses`` orders, and is away for so many looks after each.

    Args:
        losses: How many.
        looks: How many.
        heir: A node that is started with the same client's name.
    """

    def __init__(self, losses: int, looks: int = 2, heir: int | None = None) -> None:
        nodes = {10: 0, 11: 1, 12: 2, 13: 3} | ({heir: 2} if heir is not None else {})
        contexts = {
            node: Context(
                1, node, {"partition-id": index}, RecordDict(),
                {"task": TASK, "task-params": PARAMS},
            )
            for node, index in nodes.items()
        }  # fmt: skip
        super().__init__(client_app, contexts)
        self._losses, self._looks, self._heir = losses, looks, heir
        self._away = 0
        self.orders: dict[str, Message] = {}
        self.queries: Counter[int] = Counter()

    def get_node_ids(self) -> Iterable[int]:
        self._away -= 1
        gone = self._away >= 0 or (self._heir is not None and self._losses <= 0)
        return [node for node in super().get_node_ids() if not (gone and node == 12)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        orders = list(messages)
        names = list(super().push_messages(orders))
        for name, order in zip(names, orders, strict=True):
            if order.metadata.message_type == MessageType.TRAIN:
                self.orders[name] = order
            else:
                self.queries[order.metadata.dst_node_id] += 1
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (name,) = message_ids
        order = self.orders.get(name)
        if order is not None and order.metadata.dst_node_id == 12 and self._losses:
            self._losses -= 1
            self._away = self._looks
            return [Message(Error(ErrorCode.NODE_UNAVAILABLE, "node_unavail"), reply_to=order)]
        return super().pull_messages([name])

    def asked(self) -> Counter[int]:
        """How often each node was asked to train."""
        return Counter(order.metadata.dst_node_id for order in self.orders.values())


def run(
    folder: Path, grid: InProcessGrid, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> FolderStore:
    monkeypatch.setattr(again, "LOOK_S", 0.0)
    given: dict[str, Any] = {
        "name": "f", "run": "r", "rounds": 1, "clients": 4, "quorum": 4, "poll_s": 0.01,
        "durable": False, "evaluate_every": 0, "deadline_s": 60, "train": {"steps": 2},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0}, **changes,
    }  # fmt: skip
    store = FolderStore(folder, durable=False)
    cfg = FederationConfig.model_validate(given)
    MergeStrategy(cfg, open_session(TASK, PARAMS).template, store).start(grid)
    return store


def ended(store: FolderStore) -> tuple[str, int, str]:
    (row,) = store.notes("round")
    return row["status"], row["admitted"], row.get("reason", "")


def test_flowers_codes_are_what_we_take_them_for() -> None:
    assert GONE_ERRORS == (
        ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    )  # fmt: skip


def test_a_client_whose_node_was_gone_is_asked_again_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Losing(losses=2)
    store = run(tmp_path, grid, monkeypatch)
    assert ended(store) == ("published", 4, "")
    assert [row.client for row in store.contributions()] == [f"client-000{c}" for c in range(4)]
    assert grid.asked() == {10: 1, 11: 1, 12: 3, 13: 1}
    # It may be at work, and would say its name only after that.
    assert grid.queries == {10: 1, 11: 1, 12: 1, 13: 1}
    # Whoever looks sees why it took longer.
    assert [(row.client, row.code, row.reason) for row in store.refusals()] == (
        2 * [("client-0002", "gone", "node_unavail")]
    )
    assert [row["clients"] for row in store.notes("asked-again")] == 2 * [["client-0002"]]


def test_a_quorum_does_not_wait_for_who_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Losing(losses=1, looks=1_000_000)
    store = run(tmp_path, grid, monkeypatch, quorum=3)
    assert ended(store) == ("published", 3, "")
    (row,) = store.notes("round")
    assert row["seconds"] < 30


def test_who_does_not_come_back_costs_a_round_that_needs_all_until_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run(tmp_path, Losing(losses=1, looks=1_000_000), monkeypatch, deadline_s=3)
    assert ended(store) == ("abandoned", 3, "3 admitted, the quorum is 4")


def test_who_only_says_that_it_is_gone_is_asked_so_often_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Losing(losses=1_000_000, looks=0)
    store = run(tmp_path, grid, monkeypatch)
    assert ended(store) == ("abandoned", 3, "3 admitted, the quorum is 4")
    assert grid.asked()[12] == 1 + again.MOST
    (row,) = store.notes("round")
    assert row["seconds"] < 30


def test_a_client_is_asked_at_the_node_that_took_its_name_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Node 20 was started for it while node 12 still counted as there: its name was taken.
    grid = Losing(losses=1, heir=20)
    store = run(tmp_path, grid, monkeypatch)
    assert ended(store) == ("published", 4, "")
    assert grid.asked() == {10: 1, 11: 1, 12: 1, 13: 1, 20: 1}
    assert [row.client for row in store.contributions()] == [f"client-000{c}" for c in range(4)]

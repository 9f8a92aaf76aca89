"""Adapters on their way down, as changes of what clients hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from anabranch.client.app import app as client_app
from anabranch.client.held import HELD_KEY
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.wire import read_manifest
from anabranch.wire.plan import ADAPTER_KEY, ADAPTER_STYPE, CHANGE_STYPE

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'
pytestmark = pytest.mark.usefixtures("flower_identity")

Before = Callable[[Message, Context], None]


def config(**changes: Any) -> FederationConfig:
    given = {
        "name": "f", "run": "r", "rounds": 4, "clients": 4, "quorum": 3, "poll_s": 0.0,
        "train": {"steps": 3, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0},
        "down_codec": {"density": 0.2}, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


class Sent:
    """What was sent of the adapter, by round and node: its kind and bytes."""

    def __init__(self, before: Before | None = None) -> None:
        self.rows: list[tuple[str, int, int, str, int]] = []
        self._before = before

    def grid(self) -> InProcessGrid:
        """Four clients, each as in a process of its own."""
        contexts = {
            node: Context(
                1, node, {"partition-id": node - 10}, RecordDict(),
                {"task": TASK, "task-params": PARAMS},
            )
            for node in range(10, 14)
        }  # fmt: skip
        sent = self

        class Alone(ClientApp):
            def __call__(self, message: Message, context: Context) -> Message:
                kind, node = message.metadata.message_type, message.metadata.dst_node_id
                if kind != MessageType.QUERY:
                    open_session(TASK, PARAMS).start = None
                    record = message.content.array_records.get(ADAPTER_KEY)
                    array = record[ADAPTER_KEY] if record else None
                    stype, size = (array.stype, len(array.data)) if array else ("", 0)
                    sent.rows.append((kind, int(message.metadata.group_id), node, stype, size))
                    if sent._before is not None:
                        sent._before(message, context)
                return client_app(message, context)

        return InProcessGrid(Alone(), contexts)

    def kinds(self, kind: str, number: int) -> list[str]:
        """What a round's orders of a kind held of the adapter."""
        return [row[3] for row in self.rows if row[:2] == (kind, number)]


def run(
    folder: Path, cfg: FederationConfig, before: Before | None = None
) -> tuple[MergeStrategy, FolderStore, Sent]:
    sent, store = Sent(before), FolderStore(folder)
    strategy = MergeStrategy(cfg, open_session(TASK, PARAMS).template, store)
    strategy.start(sent.grid())
    return strategy, store, sent


def test_clients_get_changes_and_nothing_twice(tmp_path: Path) -> None:
    strategy, store, sent = run(tmp_path / "changes", config())
    assert store.refusals() == []
    for number in range(1, 5):
        # Round 1 starts from the seed's draw; after it the adapter to score comes as a change, and
        # the next round's start is held by then.
        assert sent.kinds("train", number) == [""] * 4
        assert sent.kinds("evaluate", number) == [CHANGE_STYPE] * 4
    _, plain, whole = run(tmp_path / "whole", config(down_codec=None))
    assert whole.kinds("train", 3) == [ADAPTER_STYPE] * 4
    down = [
        sum(row["bytes_down"] for row in one.notes("round") + one.notes("scoring"))
        for one in (store, plain)
    ]
    assert down[0] == sum(row[4] for row in sent.rows)
    assert down[0] < down[1] / 10
    # What they hold is what the coordinator serves, to the bit.
    again = MergeStrategy(config(), open_session(TASK, PARAMS).template, store)
    assert again.adapter.hash() == strategy.adapter.hash()


def test_what_coding_left_out_is_sent_later(tmp_path: Path) -> None:
    lossy, _, _ = run(tmp_path / "a", config(rounds=1))
    exact, _, _ = run(tmp_path / "b", config(rounds=1, down_codec=None))
    mine, wanted = lossy.adapter.tensors(), exact.adapter.tensors()
    for name, owed in lossy.service.owed.items():
        torch.testing.assert_close(mine[name] + owed, wanted[name], atol=1e-6, rtol=1e-5)
        assert bool(owed.any())


def test_a_client_that_lost_its_adapter_is_sent_it_whole(tmp_path: Path) -> None:
    def forget(message: Message, context: Context) -> None:
        lost = message.metadata.message_type == MessageType.EVALUATE and (
            message.metadata.group_id == "2" and message.metadata.dst_node_id == 11
        )
        if lost:
            del context.state[HELD_KEY]

    _, store, sent = run(tmp_path, config(), forget)
    (failed,) = store.notes("evaluate-failed")
    assert (failed["round"], failed["client"]) == (2, "client-0001")
    assert "the next round will send it whole" in failed["reason"]
    assert sorted(sent.kinds("train", 3)) == ["", "", "", ADAPTER_STYPE]
    assert sent.kinds("evaluate", 3) == [CHANGE_STYPE] * 4
    assert [len(store.contributions(number)) for number in range(1, 5)] == [4] * 4


def test_a_resumed_run_sends_it_whole_once(tmp_path: Path) -> None:
    run(tmp_path, config(rounds=2))
    strategy, store, sent = run(tmp_path, config(rounds=4))
    assert sent.kinds("train", 3) == [ADAPTER_STYPE] * 4
    assert sent.kinds("train", 4) == [""] * 4
    assert store.refusals() == []
    assert strategy.service.change is not None
    change = read_manifest(strategy.service.change[1]).meta
    assert (change.kind, change.start_hash) == ("change", strategy.service.change[0])


def test_signed_changes_are_checked(tmp_path: Path) -> None:
    from anabranch.coordinator.trust import trust_of
    from anabranch.simulation.keys import write_keys

    cfg = config(signed=True, rounds=2)
    keys = write_keys(tmp_path, cfg)
    store = FolderStore(tmp_path)
    strategy = MergeStrategy(
        cfg, open_session(TASK, PARAMS).template, store, trust_of(tmp_path, cfg, store)
    )
    sent = Sent()
    grid = sent.grid()
    for context in grid._contexts.values():
        context.node_config["keys"] = str(keys)
    strategy.start(grid)
    assert store.refusals() == []
    assert sent.kinds("evaluate", 2) == [CHANGE_STYPE] * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"down": "int8"}, "all clients must hold the same bits"),
        ({"ranks": {"client-0000": 2}}, "a change has one rank"),
        ({"rest": "flora"}, "frozen ranks travel whole"),
    ],
)
def test_what_a_change_cannot_stand_beside_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(**changes)

"""Rounds with clients that misbehave, on the real ClientApp and the in-process grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import FolderStore, Store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors import Adapter
from anabranch.wire.plan import UPDATE_KEY, UPDATE_STYPE

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'
pytestmark = pytest.mark.usefixtures("flower_identity")

Tamper = Callable[[Message, Message], Message]


def template() -> Adapter:
    return open_session(TASK, PARAMS).template


def config(**changes: Any) -> FederationConfig:
    given = {
        "name": "f",
        "run": "r",
        "rounds": 2,
        "clients": 4,
        "quorum": 3,
        "poll_s": 0.0,
        "train": {"steps": 3, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "mean"},
        "codec": {"name": "dense", "feedback": 0.0},
        **changes,
    }
    return FederationConfig.model_validate(given)


def grid(
    tampers: dict[int, Tamper] | None = None, seen: list[tuple[str, int]] | None = None
) -> InProcessGrid:
    """Four clients; a tamper gets (order, honest reply) of a train message and answers for it."""
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10}, RecordDict(),
            {"task": TASK, "task-params": PARAMS},
        )
        for node in range(10, 14)
    }  # fmt: skip

    class Tampering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            node = message.metadata.dst_node_id
            if message.metadata.message_type == MessageType.TRAIN and node in (tampers or {}):
                return (tampers or {})[node](message, reply)
            return reply

    def on_reply(kind: str, node: int) -> None:
        if seen is not None:
            seen.append((kind, node))

    return InProcessGrid(Tampering(), contexts, on_reply)


def garbage(order: Message, reply: Message) -> Message:
    reply.content[UPDATE_KEY] = ArrayRecord(
        {UPDATE_KEY: Array("uint8", (7,), UPDATE_STYPE, b"garbage")}
    )
    return reply


def crash(order: Message, reply: Message) -> Message:
    raise RuntimeError("CUDA out of memory")


def without(store_folder: Path, nodes: set[int], cfg: FederationConfig) -> Adapter:
    """The adapter of a federation in which these nodes never were."""
    store = FolderStore(store_folder)
    strategy = MergeStrategy(cfg, template(), store)
    whole = grid()
    for node in nodes:
        del whole._contexts[node]
    strategy.start(whole)
    return strategy.adapter


def test_bad_clients_are_quarantined_and_leave_no_trace_in_the_merge(tmp_path: Path) -> None:
    cfg = config(rounds=1, clients=4, quorum=2)
    store = FolderStore(tmp_path / "a")
    strategy = MergeStrategy(cfg, template(), store)
    strategy.start(grid({10: garbage, 12: crash}))
    refusals = {row.client: row for row in store.refusals()}
    assert sorted(refusals) == ["client-0000", "client-0002"]
    assert "CUDA out of memory" in refusals["client-0002"].reason
    assert refusals["client-0002"].code == "client-error"
    assert [row.client for row in store.contributions(1)] == ["client-0001", "client-0003"]
    honest = without(tmp_path / "b", {10, 12}, cfg.model_copy(update={"clients": 2}))
    assert strategy.adapter.hash() == honest.hash()


def test_below_the_quorum_the_round_is_abandoned_and_the_start_stays(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    strategy = MergeStrategy(config(quorum=4, rounds=1), template(), store)
    before = strategy.adapter.hash()
    strategy.start(grid({10: garbage}))
    (row,) = store.notes("round")
    assert row["status"] == "abandoned"
    assert row["admitted"] == 3
    assert strategy.adapter.hash() == before
    assert store.latest() is None


def test_the_mean_of_dense_updates_is_the_mean_of_what_clients_trained(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    strategy = MergeStrategy(config(rounds=1), template(), store)
    ends: list[torch.Tensor] = []

    def keep(order: Message, reply: Message) -> Message:
        from anabranch.client.lora import read_adapter

        ends.append(read_adapter(open_session(TASK, PARAMS).model).lora["hidden"].delta().dense())
        return reply

    strategy.start(grid(dict.fromkeys(range(10, 14), keep)))
    merged = strategy.adapter.lora["hidden"].delta().dense()
    wanted = torch.stack(ends).mean(0)
    # Four rank-4 changes make rank 16 at most: rank 4 keeps the best part, as reported.
    left, values, right = torch.linalg.svd(wanted.double())
    best = (left[:, :4] * values[:4]) @ right[:4]
    assert (merged - best).norm() <= 1e-5 * wanted.norm()
    latest = store.latest()
    assert latest is not None
    error = float(values[4:].norm() / values.norm())
    assert latest.report["overall_truncation"] == pytest.approx(error, rel=1e-4)


def test_an_interrupted_round_asks_only_the_clients_still_missing(tmp_path: Path) -> None:
    whole = MergeStrategy(config(), template(), FolderStore(tmp_path / "whole"))
    whole.start(grid())

    class Dying(FolderStore):
        def admit(self, contribution: Any) -> bool:
            if contribution.round == 2 and len(self.contributions(2)) == 2:
                raise KeyboardInterrupt
            return super().admit(contribution)

    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(config(), template(), Dying(tmp_path / "cut")).start(grid())
    seen: list[tuple[str, int]] = []
    store: Store = FolderStore(tmp_path / "cut")
    again = MergeStrategy(config(), template(), store)
    again.start(grid(seen=seen))
    assert [node for kind, node in seen if kind == MessageType.TRAIN] == [12, 13]
    assert [row.round for row in store.contributions(2)] == [2, 2, 2, 2]
    assert again.adapter.hash() == whole.adapter.hash()


def test_sampling_follows_the_seed_and_the_fraction(tmp_path: Path) -> None:
    def asked(seed: int, folder: str) -> list[list[str]]:
        store = FolderStore(tmp_path / folder)
        cfg = config(fraction=0.5, quorum=1, rounds=4, seed=seed, evaluate_every=0)
        MergeStrategy(cfg, template(), store).start(grid())
        return [row["asked"] for row in store.notes("planned")]

    first = asked(1, "a")
    assert [len(names) for names in first] == [2, 2, 2, 2]
    assert first == asked(1, "b")
    assert first != asked(2, "c")


def test_it_gives_up_when_too_few_clients_join(tmp_path: Path) -> None:
    cfg = config(clients=9, join_timeout_s=0.2)
    with pytest.raises(RuntimeError, match="4 of 9 clients joined"):
        MergeStrategy(cfg, template(), FolderStore(tmp_path)).start(grid())


def test_two_nodes_cannot_share_a_name(tmp_path: Path) -> None:
    twins = grid()
    twins._contexts[11].node_config["partition-id"] = 0
    store = FolderStore(tmp_path)
    MergeStrategy(config(clients=3, rounds=1, quorum=1), template(), store).start(twins)
    assert [row.client for row in store.contributions(1)] == [
        "client-0000", "client-0002", "client-0003",
    ]  # fmt: skip
    assert "taken" in store.notes("meet-failed")[0]["reason"]


def test_a_start_without_a_base_hash_is_refused(tmp_path: Path) -> None:
    nameless = template().with_tensors(template().tensors())
    nameless = Adapter(nameless.lora, nameless.dense, None, nameless.peft)
    with pytest.raises(ValueError, match="base hash"):
        MergeStrategy(config(), nameless, FolderStore(tmp_path))

"""What a federation's receipts say of its rounds, on the real ClientApp and the in-process grid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.receipts import abandoned_receipt, configuration, merge_receipt
from anabranch.coordinator.store import Publication, Store, open_store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.trust import trust_of
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.simulation.keys import write_keys
from anabranch.vectors import Adapter
from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.plan import UPDATE_KEY, UPDATE_STYPE
from anabranch.wire.receipt import Receipt, check_chain, decode_receipt, receipt_hash
from anabranch.wire.signing import KeyRing

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 3}'
pytestmark = pytest.mark.usefixtures("flower_identity")


def template() -> Adapter:
    return open_session(TASK, PARAMS).template


def config(**changes: Any) -> FederationConfig:
    given = {
        "name": "f", "run": "r", "rounds": 2, "clients": 3, "quorum": 2, "poll_s": 0.0,
        "durable": False,
        "train": {"steps": 2, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0}, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


def garbage(reply: Message) -> Message:
    reply.content[UPDATE_KEY] = ArrayRecord(
        {UPDATE_KEY: Array("uint8", (7,), UPDATE_STYPE, b"garbage")}
    )
    return reply


def grid(bad: Callable[[int, int], bool] = lambda round_, node: False, keys: Any = None) -> Any:
    """Three clients; ``bad`` says of which round and node the reply is garbage."""
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10, **({"keys": str(keys)} if keys else {})},
            RecordDict(), {"task": TASK, "task-params": PARAMS},
        )
        for node in (10, 11, 12)
    }  # fmt: skip

    class Tampering(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            if message.metadata.message_type == MessageType.TRAIN:
                server_round = int(message.content.config_records["plan"]["server-round"])
                if bad(server_round, message.metadata.dst_node_id):
                    return garbage(reply)
            return reply

    return InProcessGrid(Tampering(), contexts)


def opened(folder: Path, cfg: FederationConfig) -> Store:
    return open_store(cfg.store, folder, federation=cfg.name, run=cfg.run, durable=False)


def run(folder: Path, cfg: FederationConfig, over: Any = None) -> tuple[MergeStrategy, Store]:
    store = opened(folder, cfg)
    trust = trust_of(folder, cfg, store) if cfg.signed else None
    strategy = MergeStrategy(cfg, template(), store, trust)
    strategy.start(over or grid())
    return strategy, store


def last(store: Store) -> Receipt:
    data = store.last_receipt()
    assert data is not None
    return decode_receipt(data, None)


@pytest.mark.parametrize("url", ["sqlite:///store.db", "journal"])
def test_each_round_leaves_a_receipt_of_what_went_in_and_came_out(tmp_path: Path, url: str) -> None:
    cfg = config(store={"url": url}, seed=2**64 - 1)
    strategy, store = run(tmp_path, cfg, grid(lambda round_, node: (round_, node) == (2, 11)))
    one, two = check_chain(store.receipts(), None)
    assert [one.kind, two.kind] == ["merge", "merge"]
    assert (
        one.start_hash == MergeStrategy(cfg, template(), opened(tmp_path / "x", cfg)).adapter.hash()
    )
    for receipt, row in zip((one, two), store.publications(), strict=True):
        assert receipt.output is not None
        assert receipt.output.adapter_hash == row.adapter_hash
        assert receipt.output.artifact == row.digest
        assert receipt.output.size_bytes == len(store.get(row.digest))
        assert [(found.client, found.artifact, found.size_bytes) for found in receipt.inputs] == [
            (found.client, found.digest, found.size_bytes)
            for found in store.contributions(receipt.round)
        ]
    assert [row.weight for row in one.inputs] == pytest.approx([1 / 3] * 3)
    assert [row.weight for row in two.inputs] == pytest.approx([1 / 2] * 2)
    assert one.exclusions == ()
    assert [(row.client, row.code) for row in two.exclusions] == [("client-0001", "truncated")]
    # What is known of a start is what the clients scored after the round before.
    rows = [row for row in store.notes("evaluate") if row["round"] == 1]
    assert two.scores["start.accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows) / 3)
    assert "start.accuracy" not in one.scores
    losses = [row.metrics["train-loss"] for row in store.contributions(1)]
    assert one.scores["cohort.train-loss"] == pytest.approx(sum(losses) / 3)
    truncation = store.publications()[0].report["overall_truncation"]
    assert one.scores["truncation-error"] == pytest.approx(truncation)
    assert not any("seconds" in name for name in one.scores)
    # And nothing of it is a guess: the configuration is read back to the last digit.
    assert configuration(one, cfg) == cfg
    assert "store" not in one.settings
    assert strategy.adapter.hash() == two.output.adapter_hash if two.output else False


def test_an_unsigned_federation_says_so_and_a_signed_one_signs(tmp_path: Path) -> None:
    _, store = run(tmp_path / "plain", config(rounds=1))
    assert last(store).signer is None
    cfg = config(rounds=1, signed=True)
    keys = write_keys(tmp_path / "signed", cfg)
    _, store = run(tmp_path / "signed", cfg, grid(keys=keys))
    key = seeded_key("coordinator", cfg.seed).public
    (receipt,) = check_chain(store.receipts(), KeyRing(by_id([key])))
    assert receipt.signer == key.id.hex()
    assert [row.nonce for row in receipt.inputs] == [row.nonce for row in store.contributions(1)]
    assert all(len(row.nonce) == 32 for row in receipt.inputs)


def test_an_abandoned_round_has_a_receipt_and_the_next_starts_where_it_did(tmp_path: Path) -> None:
    _, store = run(tmp_path, config(rounds=3), grid(lambda round_, node: round_ == 2 and node > 10))
    one, two, three = check_chain(store.receipts(), None)
    assert (two.kind, two.output, two.reason) == ("abandoned", None, "1 admitted, the quorum is 2")
    assert [row.client for row in two.inputs] == ["client-0000"]
    assert [row.client for row in two.exclusions] == ["client-0001", "client-0002"]
    assert one.output is not None
    assert one.output.adapter_hash == two.start_hash == three.start_hash
    assert [row["status"] for row in store.notes("round")] == [
        "published", "abandoned", "published",
    ]  # fmt: skip


def test_a_run_that_was_cut_goes_on_with_its_chain(tmp_path: Path) -> None:
    whole, whole_store = run(tmp_path / "whole", config(rounds=3))
    cut_store = opened(tmp_path / "cut", config(rounds=3))
    publish, admit = cut_store.publish, cut_store.admit

    def dying_admit(row: Any) -> bool:
        if row.round == 2 and len(cut_store.contributions(2)) == 2:
            raise KeyboardInterrupt
        return admit(row)

    cut_store.admit = dying_admit  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(config(rounds=3), template(), cut_store).start(grid())

    def dying_publish(*arguments: Any) -> None:
        publish(*arguments)
        raise KeyboardInterrupt

    cut_store.admit, cut_store.publish = admit, dying_publish  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(config(rounds=3), template(), cut_store).start(grid())
    cut_store.publish = publish  # type: ignore[method-assign]
    again = MergeStrategy(config(rounds=3), template(), cut_store)
    again.start(grid())
    assert again.adapter.hash() == whole.adapter.hash()
    found, wanted = (check_chain(store.receipts(), None) for store in (cut_store, whole_store))
    assert [row.round for row in found] == [1, 2, 3]
    for one, other in zip(found, wanted, strict=True):
        assert [row.client for row in one.inputs] == [row.client for row in other.inputs]
        assert one.start_hash == other.start_hash
        assert one.output is not None
        assert other.output is not None
        assert one.output.adapter_hash == other.output.adapter_hash


def test_a_private_federation_s_receipt_tells_neither_seed_nor_scores(tmp_path: Path) -> None:
    cfg = config(
        rounds=1, recipe={"method": "fedit"},
        privacy={"clip": 1.0, "epsilon": 50.0, "delta": 1e-3, "noise_seed": 77},
    )  # fmt: skip
    _, store = run(tmp_path, cfg)
    receipt = last(store)
    assert "noise_seed" not in json.dumps(receipt.settings)
    assert list(receipt.scores) == ["truncation-error"]
    assert configuration(receipt, cfg) == cfg
    assert cfg.privacy is not None
    there = cfg.model_copy(update={"privacy": None})
    read = configuration(receipt, there).privacy
    assert read == cfg.privacy.model_copy(update={"noise_seed": None})


def test_a_round_that_somebody_else_ended_comes_to_nothing(tmp_path: Path) -> None:
    """Another process publishes the round that is being collected, as a rollback does."""
    cfg = config(rounds=3)
    store, other = opened(tmp_path, cfg), opened(tmp_path, cfg)
    strategy = MergeStrategy(cfg, template(), store)

    def overtake(round_: int, node: int) -> bool:
        if (round_, node) == (2, 12):
            first = other.publications()[0]
            row = Publication(round=2, digest=first.digest, adapter_hash=first.adapter_hash)
            receipt = merge_receipt(other, cfg, strategy.plan(2), [], row, strategy.service, None)
            other.publish(row, {"round": 2, "status": "published"}, [receipt])
        return False

    strategy.start(grid(overtake))
    chain = check_chain(store.receipts(), None)
    assert [row.round for row in chain] == [1, 2, 3]
    assert [len(row.inputs) for row in chain] == [3, 0, 3]
    first, second, third = store.publications()
    assert second.digest == first.digest
    assert chain[2].start_hash == first.adapter_hash
    assert third.adapter_hash == strategy.adapter.hash()
    assert chain[1].previous == receipt_hash(store.receipts()[0])


def test_a_receipt_says_what_a_gate_found_and_whom_the_merge_left_out(tmp_path: Path) -> None:
    cfg = config(rounds=1)
    strategy, store = run(tmp_path, cfg)
    (row,) = store.publications()
    finding = {
        "client": "client-0002", "module": None, "signal": "energy", "score": 9.0,
        "why": "its energy lies in one direction", "action": "exclude",
    }  # fmt: skip
    noted = {**finding, "client": "client-0000", "action": "note"}
    report = {**row.report, "suspicion": {"scores": {}, "findings": [finding, noted]}}
    gate = {
        "passed": True, "reasons": [], "metric_before": 0.5, "metric": 0.75, "asr_class": "x",
        "negative_flips": math.nan,
    }  # fmt: skip
    plan = strategy.plan(2)
    rows = store.contributions(1)
    publication = row.model_copy(update={"round": 2, "report": report})
    data = merge_receipt(store, cfg, plan, rows, publication, strategy.service, None, None, gate)
    receipt = decode_receipt(data, None)
    assert [(one.client, one.code, one.reason) for one in receipt.exclusions] == [
        ("client-0002", "suspicion", "its energy lies in one direction")
    ]
    scores = {name: value for name, value in receipt.scores.items() if name.startswith("gate.")}
    assert scores == {"gate.metric-before": 0.5, "gate.metric": 0.75, "gate.negative-flips": None}
    data = abandoned_receipt(store, cfg, plan, rows, "the gate kept it back", None, gate)
    assert decode_receipt(data, None).scores == scores

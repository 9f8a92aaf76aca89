"""Rounds with clients that misbehave, on the real ClientApp and the in-process grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from anabranch.aggregation import truncate
from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator import cohort as cohort_module
from anabranch.coordinator.admission import layouts
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import FolderStore, Store, TakenError
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.vectors import Adapter
from anabranch.vectors.frozen import split
from anabranch.wire import decode_forms, encode_update
from anabranch.wire.plan import PLAN_KEY, UPDATE_KEY, UPDATE_STYPE, RoundPlan

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


def huge(order: Message, reply: Message) -> Message:
    """The honest reply with every value at 1e30: finite, and ruin for whoever multiplies it."""
    from anabranch.wire import UpdateMeta
    from anabranch.wire.config import CodecConfig

    plan = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
    tensors = {name: torch.full_like(tensor, 1e30) for name, tensor in template().tensors().items()}
    client = str(reply.content.config_records["client"]["client"])
    meta = UpdateMeta(
        "update", plan.base_hash, plan.start_hash, plan.federation, plan.run, plan.round,
        client, b"", plan.seed, 1,
    )  # fmt: skip
    blob = encode_update(tensors, meta, CodecConfig(name="dense")).blob
    reply.content[UPDATE_KEY] = ArrayRecord(
        {UPDATE_KEY: Array("uint8", (len(blob),), UPDATE_STYPE, blob)}
    )
    return reply


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
    cfg = config(rounds=1, clients=4, quorum=1)
    store = FolderStore(tmp_path / "a")
    strategy = MergeStrategy(cfg, template(), store)
    strategy.start(grid({10: garbage, 11: huge, 12: crash}))
    refusals = {row.client: row for row in store.refusals()}
    assert sorted(refusals) == ["client-0000", "client-0001", "client-0002"]
    assert refusals["client-0001"].code == "overflow"
    assert "CUDA out of memory" in refusals["client-0002"].reason
    assert refusals["client-0002"].code == "client-error"
    assert [row.client for row in store.contributions(1)] == ["client-0003"]
    alone = cfg.model_copy(update={"clients": 1})
    honest = without(tmp_path / "b", {10, 11, 12}, alone)
    assert strategy.adapter.hash() == honest.hash()


class Counting(FolderStore):
    """Counts the artifacts that are read back."""

    reads = 0

    def get(self, digest: str) -> bytes:
        self.reads += 1
        return super().get(digest)


def test_updates_too_many_to_keep_decoded_are_read_back_for_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    size_bytes = sum(4 * tensor.numel() for tensor in template().tensors().values())
    for kept in (4, 2, 0):
        monkeypatch.setattr(cohort_module, "DECODED_BYTES", kept * size_bytes)
        store = Counting(tmp_path / str(kept))
        strategy = MergeStrategy(config(rounds=1), template(), store)
        strategy.start(grid())
        assert store.reads == 4 - kept
        hashes.append(strategy.adapter.hash())
    assert len(set(hashes)) == 1


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


@pytest.mark.parametrize("trains", ["b", "alternate"])
def test_with_one_factor_shared_the_mean_is_exact_in_every_round(
    tmp_path: Path, trains: str
) -> None:
    from anabranch.client.lora import read_adapter

    cfg = config(trains=trains, rounds=3)
    ends: list[torch.Tensor] = []
    rounds: list[Adapter] = []

    def keep(order: Message, reply: Message) -> Message:
        ends.append(read_adapter(open_session(TASK, PARAMS).model).lora["hidden"].delta().dense())
        return reply

    store = FolderStore(tmp_path)
    strategy = MergeStrategy(cfg, template(), store)
    rounds.append(strategy.adapter)

    def look(number: int, arrays: Any) -> None:
        rounds.append(strategy.adapter)

    strategy.start(grid(dict.fromkeys(range(10, 14), keep)), evaluate_fn=look)
    assert len(rounds) == 4
    for number, (before, after) in enumerate(itertools.pairwise(rounds), start=1):
        mean = torch.stack(ends[4 * number - 4 : 4 * number]).mean(0)
        merged = after.lora["hidden"].delta().dense()
        assert (merged - mean).norm() <= 1e-6 * mean.norm()
        kept = "hidden.lora_B" if trains == "alternate" and number == 2 else "hidden.lora_A"
        for name, tensor in after.tensors().items():
            assert torch.equal(tensor, before.tensors()[name]) == (name == kept)
    again = MergeStrategy(cfg, template(), FolderStore(tmp_path))
    assert again.adapter.hash() == strategy.adapter.hash()


def loud(order: Message, reply: Message) -> Message:
    """The honest reply, which claims that its entries matter a million times as much."""
    plan = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
    expected = layouts(template(), plan)
    blob = reply.content.array_records[UPDATE_KEY][UPDATE_KEY].data
    meta, forms, importance = decode_forms(blob, *expected)
    tensors = {name: form.dense() for name, form in forms.items()}
    louder = {name: 1e6 * part for name, part in importance.items()}
    blob = encode_update(tensors, meta, plan.codec, importance=louder).blob
    reply.content[UPDATE_KEY] = ArrayRecord(
        {UPDATE_KEY: Array("uint8", (len(blob),), UPDATE_STYPE, blob)}
    )
    return reply


@pytest.mark.parametrize("trains", ["both", "alternate"])
@pytest.mark.parametrize("decoded_bytes", [1 << 20, 0])
def test_clients_ship_the_fisher_that_the_recipe_needs(
    trains: str, decoded_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort_module, "DECODED_BYTES", decoded_bytes)
    cfg = config(recipe={"method": "fisher"}, trains=trains)
    hashes = []
    for name, tampers in (("a", {}), ("b", {}), ("loud", {11: loud})):
        strategy = MergeStrategy(cfg, template(), FolderStore(tmp_path / name))
        strategy.start(grid(tampers))
        assert [row["status"] for row in strategy.store.notes("round")] == ["published"] * 2
        hashes.append(strategy.adapter)
    assert hashes[0].hash() == hashes[1].hash()
    # Levels are rounded in another place when all is multiplied; nothing else may change.
    for name, tensor in hashes[0].tensors().items():
        torch.testing.assert_close(hashes[2].tensors()[name], tensor, atol=1e-3, rtol=1e-3)
    mean = MergeStrategy(
        config(recipe={"method": "mean"}, trains=trains), template(), FolderStore(tmp_path / "mean")
    )
    mean.start(grid())
    assert mean.adapter.hash() != hashes[0].hash()


@pytest.mark.parametrize(
    ("rest", "ranks"), [("fedex", {}), ("flora", {}), ("flora", {"client-0001": 1})]
)
def test_with_the_rest_kept_nothing_of_a_round_is_lost(
    tmp_path: Path, rest: str, ranks: dict[str, int]
) -> None:
    from anabranch.client.lora import read_adapter

    cfg = config(rest=rest, ranks=ranks, rounds=4)
    changes: list[torch.Tensor] = []
    rounds: list[Adapter] = []
    store = FolderStore(tmp_path)
    strategy = MergeStrategy(cfg, template(), store)

    def keep(order: Message, reply: Message) -> Message:
        plan = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
        model = open_session(TASK, PARAMS).at_rank(plan.rank).model
        end = read_adapter(model).lora["hidden"].delta().dense()
        client = f"client-000{order.metadata.dst_node_id - 10}"
        begun = strategy._here.orders.start(client, plan.round)
        start = begun.adapter.lora["hidden"].delta().dense()
        changes.append(end - start)
        return reply

    def look(number: int, arrays: Any) -> None:
        rounds.append(strategy.adapter)

    strategy.start(grid(dict.fromkeys(range(10, 14), keep)), evaluate_fn=look)
    total = torch.zeros(64, 32)
    for number, adapter in enumerate(rounds):
        total += torch.stack(changes[4 * number : 4 * number + 4]).mean(0)
        merged = adapter.lora["hidden"].delta().dense()
        assert (merged - total).norm() <= 2e-6 * total.norm()
        # As many ranks as the matrix has, and those that are trained.
        assert 4 < adapter.lora["hidden"].rank <= 36
        trained, _ = split(adapter, template())
        assert bool(trained.lora["hidden"].b_mr.any()) == (rest == "fedex")
    assert rounds[3].lora["hidden"].rank > rounds[0].lora["hidden"].rank
    assert len({adapter.tensors()["hidden.lora_A"][0, 0].item() for adapter in rounds}) == 4
    again = MergeStrategy(cfg, template(), FolderStore(tmp_path))
    assert again.adapter.hash() == strategy.adapter.hash()
    latest = store.latest()
    assert latest is not None
    assert latest.report["overall_truncation"] == 0


@pytest.mark.parametrize("method", ["mean", "ties", "fisher", "hetlora", "lora_lego"])
def test_clients_of_several_ranks_each_start_from_theirs(tmp_path: Path, method: str) -> None:
    ranks = {"client-0000": 1, "client-0002": 2}
    cfg = config(ranks=ranks, rounds=2, recipe={"method": method})
    store = FolderStore(tmp_path / "whole")
    strategy = MergeStrategy(cfg, template(), store)
    plans: dict[tuple[int, int], RoundPlan] = {}

    def keep(order: Message, reply: Message) -> Message:
        asked = RoundPlan.model_validate_json(str(order.content.config_records[PLAN_KEY][PLAN_KEY]))
        plans[asked.round, order.metadata.dst_node_id] = asked
        return reply

    starts: list[Adapter] = [strategy.adapter]

    def look(number: int, arrays: Any) -> None:
        starts.append(strategy.adapter)

    strategy.start(grid(dict.fromkeys(range(10, 14), keep)), evaluate_fn=look)
    assert not store.refusals()
    assert [row["status"] for row in store.notes("round")] == ["published"] * 2
    for (number, node), asked in plans.items():
        rank = ranks.get(f"client-00{node - 10:02}")
        assert asked.rank == rank
        whole = starts[number - 1]
        nested = number == 1 or method == "hetlora"
        wanted = whole
        if rank is not None:
            wanted = whole.leading(rank) if nested else truncate(whole, rank)
        assert asked.start_hash == wanted.hash()
    sizes = {row.client: row.size_bytes for row in store.contributions(2)}
    assert sizes["client-0000"] < sizes["client-0002"] < sizes["client-0001"]
    rows = store.notes("round")
    assert 0 < rows[1]["bytes_down"] < 4 * len(strategy.service.blob or b"")
    assert strategy.adapter.lora["hidden"].rank == 4

    class Dying(FolderStore):
        def admit(self, contribution: Any) -> bool:
            if contribution.round == 2 and len(self.contributions(2)) == 2:
                raise KeyboardInterrupt
            return super().admit(contribution)

    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(cfg, template(), Dying(tmp_path / "cut")).start(grid())
    again = MergeStrategy(cfg, template(), FolderStore(tmp_path / "cut"))
    again.start(grid())
    assert again.adapter.hash() == strategy.adapter.hash()


def test_a_client_that_ships_more_ranks_than_asked_is_refused(tmp_path: Path) -> None:
    def greedy(order: Message, reply: Message) -> Message:
        return huge(order, reply)  # all ranks

    store = FolderStore(tmp_path)
    cfg = config(ranks={"client-0000": 1}, rounds=1)
    MergeStrategy(cfg, template(), store).start(grid({10: greedy}))
    (refusal,) = store.refusals()
    assert (refusal.client, refusal.code) == ("client-0000", "layout")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ranks": {"a": 5}}, r"ranks\.a: 5 is above 4"),
        ({"ranks": {"a": 2}, "recipe": {"method": "fedit"}}, "ranks: fedit averages factors"),
        ({"rest": "fedex", "recipe": {"method": "ties"}}, "rest: ties gives no sum of factors"),
        (
            {"rest": "fedex", "recipe": {"method": "mean", "pre": [{"name": "clip"}]}},
            "plain means of A and B",
        ),
    ],
)
def test_what_the_method_cannot_merge_are_refused_at_once(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        MergeStrategy(config(**changes), template(), FolderStore(tmp_path))


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


def test_a_merge_that_cannot_be_done_costs_the_round_and_not_the_federation(
    tmp_path: Path,
) -> None:
    tampers: dict[int, Tamper] = {}

    def once(order: Message, reply: Message) -> Message:
        tampers.clear()
        return garbage(order, reply)

    tampers[10] = once
    cfg = config(recipe={"method": "multi_krum", "params": {"f": 0, "m": 4}}, rounds=2, quorum=2)
    store = FolderStore(tmp_path)
    MergeStrategy(cfg, template(), store).start(grid(tampers))
    rows = store.notes("round")
    assert [row["status"] for row in rows] == ["abandoned", "published"]
    assert "lower m" in rows[0]["reason"]


def test_finished_rounds_are_not_run_again_whatever_their_outcome(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    MergeStrategy(config(quorum=4, rounds=1), template(), store).start(grid({10: garbage}))
    again = FolderStore(tmp_path)
    MergeStrategy(config(quorum=4, rounds=2), template(), again).start(grid())
    assert [(row["round"], row["status"]) for row in again.notes("round")] == [
        (1, "abandoned"), (2, "published"),
    ]  # fmt: skip


def test_an_interrupted_evaluation_asks_only_who_is_missing(tmp_path: Path) -> None:
    class Dying(FolderStore):
        def note(self, event: str, facts: dict[str, Any]) -> None:
            if event == "evaluate" and facts["client"] == "client-0002":
                raise KeyboardInterrupt
            super().note(event, facts)

    cfg = config(rounds=1)
    with pytest.raises(KeyboardInterrupt):
        MergeStrategy(cfg, template(), Dying(tmp_path)).start(grid())
    seen: list[tuple[str, int]] = []
    store = FolderStore(tmp_path)
    MergeStrategy(cfg, template(), store).start(grid(seen=seen))
    assert [node for kind, node in seen if kind == MessageType.EVALUATE] == [12, 13]
    assert [row["client"] for row in store.notes("evaluate")] == [
        f"client-000{i}" for i in range(4)
    ]


def test_nodes_come_and_go_between_rounds(tmp_path: Path) -> None:
    whole = grid()
    away = whole._contexts.pop(12)
    store = FolderStore(tmp_path)
    strategy = MergeStrategy(config(clients=3, quorum=2, rounds=3), template(), store)
    publish = store.publish

    def move(publication: Any, facts: Any, receipts: Any) -> None:
        publish(publication, facts, receipts)
        if publication.round == 1:
            whole._contexts[12] = away  # arrives late
            del whole._contexts[10]
        if publication.round == 2:
            # Node 11 restarts under a new number, before the old one has gone.
            whole._contexts[21] = whole._contexts[11]

    store.publish = move  # type: ignore[method-assign]
    strategy.start(whole)
    clients = [[row.client[-1] for row in store.contributions(n)] for n in (1, 2, 3)]
    assert clients == [["0", "1", "3"], ["1", "2", "3"], ["1", "2", "3"]]
    assert "taken" in store.notes("meet-failed")[0]["reason"]
    del whole._contexts[11]
    strategy.roster._retry_at.clear()
    strategy.roster.refresh(whole)
    assert strategy.roster.nodes() == {21: "client-0001", 12: "client-0002", 13: "client-0003"}


def test_hostile_scores_and_names_leave_the_record_clean(tmp_path: Path) -> None:
    def lie(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        node = message.metadata.dst_node_id
        if message.metadata.message_type == MessageType.EVALUATE and node == 10:
            lies = {"round": 99, "accuracy": 1e300, "loss": 0.5, "x" * 10_000: 1.0}
            reply.content["metrics"] = MetricRecord(lies)
        if message.metadata.message_type == MessageType.EVALUATE and node == 11:
            return Message(Error(2, "no\x1b[2J\n" * 1000), reply_to=message)
        if message.metadata.message_type == MessageType.QUERY and node == 13:
            reply.content["client"] = ConfigRecord({"client": "<script>\x1b[2J"})
        return reply

    hostile = grid()
    hostile._client_app = lie  # type: ignore[assignment]
    store = FolderStore(tmp_path)
    cfg = config(rounds=1, clients=3, quorum=3)
    result = MergeStrategy(cfg, template(), store).start(hostile)
    rows = {row["client"]: row for row in store.notes("evaluate")}
    assert sorted(rows) == ["client-0000", "client-0002"]
    assert rows["client-0000"] == {"round": 1, "client": "client-0000", "loss": 0.5}
    (failed,) = store.notes("evaluate-failed")
    assert len(failed["reason"]) <= 300
    assert failed["reason"].isprintable()
    assert "no name" in store.notes("meet-failed")[0]["reason"]
    assert "\x1b" not in (tmp_path / "metrics.jsonl").read_text()
    assert result.evaluate_metrics_clientapp[1]["loss"] > 0


def test_a_round_whose_end_was_refused_for_anothers_receipt_is_done_again(tmp_path: Path) -> None:
    """Nobody is asked again: the cohort stands, and the round's number is its own."""

    class Overtaken(FolderStore):
        refused = 0

        def publish(self, *given: Any, **named: Any) -> None:
            if self.refused == 0:
                self.refused += 1
                raise TakenError("another process ended a round meanwhile")
            super().publish(*given, **named)

    seen: list[tuple[str, int]] = []
    store = Overtaken(tmp_path / "a")
    found = MergeStrategy(config(), template(), store)
    found.start(grid(seen=seen))
    assert [(row["round"], row["status"]) for row in store.notes("round")] == [
        (1, "published"), (2, "published"),
    ]  # fmt: skip
    assert [kind for kind, _ in seen].count(MessageType.TRAIN) == 8
    whole = MergeStrategy(config(), template(), FolderStore(tmp_path / "b"))
    whole.start(grid())
    assert found.adapter.hash() == whole.adapter.hash()

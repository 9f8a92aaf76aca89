"""The ClientApp and its mods, called as Flower calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)

from anabranch.client.app import app, client_seed
from anabranch.client.mods import BASE_MISMATCH, RESIDUAL_KEY
from anabranch.client.records import unpack
from anabranch.client.session import open_session
from anabranch.simulation import synthetic
from anabranch.simulation.synthetic import SyntheticTask
from anabranch.vectors import Adapter, LowRank, seeded_start
from anabranch.vectors.frozen import join
from anabranch.vectors.importance import importance_layout
from anabranch.wire import (
    CodecConfig,
    UpdateMeta,
    WireError,
    decode_forms,
    decode_update,
    encode_update,
)
from anabranch.wire.plan import ADAPTER_STYPE, PLAN_KEY, RoundPlan

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 2}'
SESSION = open_session(TASK, PARAMS)
LAYOUT = {name: tuple(tensor.shape) for name, tensor in SESSION.template.tensors().items()}
pytestmark = pytest.mark.usefixtures("flower_identity")


def plan(**changes: Any) -> RoundPlan:
    given: dict[str, Any] = {
        "federation": "f",
        "run": "r",
        "round": 1,
        "base_hash": SESSION.base_hash,
        "start_hash": seeded_start(SESSION.template, 5).hash(),
        "seed": 5,
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        **changes,
    }
    return RoundPlan.model_validate(given)


def context(**node: Any) -> Context:
    return Context(
        1, 2, {"partition-id": 1, **node}, RecordDict(), {"task": TASK, "task-params": PARAMS}
    )


def order(asked: RoundPlan, kind: str = MessageType.TRAIN) -> Message:
    record = ConfigRecord({PLAN_KEY: asked.model_dump_json()})
    return Message(RecordDict({PLAN_KEY: record}), 2, kind)


def from_adapter(start: Adapter, asked: RoundPlan) -> Message:
    """An order that carries the adapter to start from."""
    meta = UpdateMeta("adapter", SESSION.base_hash, "", "f", "r", 1, "", b"", 5, 0)
    blob = encode_update(start.tensors(), meta, CodecConfig(name="dense")).blob
    message = order(asked.model_copy(update={"start_hash": start.hash()}))
    array = Array("uint8", (len(blob),), ADAPTER_STYPE, blob)
    message.content["adapter"] = ArrayRecord({"adapter": array})
    return message


def sent(reply: Message) -> dict[str, torch.Tensor]:
    return decode_update(reply.content.array_records["update"]["update"].data, LAYOUT)[1]


def test_training_replies_with_an_update_that_names_what_it_is() -> None:
    reply = app(order(plan()), context(client="st-mary"))
    meta, tensors = decode_update(reply.content.array_records["update"]["update"].data, LAYOUT)
    assert (meta.federation, meta.run, meta.round, meta.client) == ("f", "r", 1, "st-mary")
    assert meta.base_hash == SESSION.base_hash
    assert meta.start_hash == plan().start_hash
    assert meta.examples == 256
    assert reply.content.config_records["client"]["client"] == "st-mary"
    assert any(bool(tensor.any()) for tensor in tensors.values())
    assert float(reply.content.metric_records["metrics"]["train-seconds"]) > 0  # type: ignore[arg-type]


def test_another_base_is_refused_before_training() -> None:
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        reply = app(order(plan(base_hash="00" * 32), kind), context())
        assert reply.error.code == BASE_MISMATCH
        assert "plan names 000000000000" in (reply.error.reason or "")


def test_a_start_that_is_not_the_plan_s_stops_the_client() -> None:
    with pytest.raises(ValueError, match="starts from adapter"):
        app(order(plan(start_hash="00" * 32)), context())


def test_a_message_without_a_plan_says_so() -> None:
    with pytest.raises(ValueError, match="no round plan"):
        app(Message(RecordDict(), 2, MessageType.TRAIN), context())


def test_a_run_without_a_task_says_how_to_name_one() -> None:
    empty = context()
    empty.run_config = {}
    with pytest.raises(ValueError, match="set task"):
        app(order(plan()), empty)


def test_an_adapter_in_another_format_is_refused() -> None:
    message = order(plan(start_hash="00" * 32))
    message.content["adapter"] = ArrayRecord({"adapter": Array("uint8", (1,), "pickle", b"x")})
    with pytest.raises(ValueError, match="came as 'pickle'"):
        app(message, context())


def test_the_adapter_that_is_sent_is_the_one_trained_from() -> None:
    start = seeded_start(SESSION.template, 5)
    moved = start.with_tensors({name: tensor + 0.01 for name, tensor in start.tensors().items()})
    asked = plan(codec=CodecConfig(name="dense", feedback=0.0))
    reply = app(from_adapter(moved, asked), context())
    from anabranch.client.lora import read_adapter

    after = read_adapter(SESSION.model).tensors()
    for name, change in sent(reply).items():
        torch.testing.assert_close(moved.tensors()[name] + change, after[name])


def test_what_the_codec_dropped_is_sent_later() -> None:
    node = context()
    dense = CodecConfig(name="dense", feedback=0.0)
    truth = sent(app(order(plan(codec=dense)), context()))
    sparse = CodecConfig(density=0.1)
    first = sent(app(order(plan(codec=sparse)), node))
    residual = unpack(node.state.array_records[RESIDUAL_KEY])
    for name, wanted in truth.items():
        torch.testing.assert_close(first[name] + residual[name], wanted)
    # The next round starts elsewhere: the residual comes on top of what it trains.
    moved = seeded_start(SESSION.template, 5)
    moved = moved.with_tensors({name: tensor + 0.01 for name, tensor in moved.tensors().items()})
    second = sent(app(from_adapter(moved, plan(round=2, codec=sparse)), node))
    again = sent(app(from_adapter(moved, plan(round=2, codec=dense)), context()))
    left = unpack(node.state.array_records[RESIDUAL_KEY])
    for name in truth:
        torch.testing.assert_close(second[name] + left[name], again[name] + residual[name])


def test_a_change_made_again_after_an_abandoned_round_counts_once() -> None:
    node = context()
    sparse = CodecConfig(density=0.1)
    first = sent(app(order(plan(codec=sparse)), node))
    # The start has not moved: nothing of the first update was merged.
    second = sent(app(order(plan(codec=sparse)), node))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


@pytest.mark.parametrize(
    "change", [{"round": 9}, {"run": "another"}], ids=["rounds missed", "another run"]
)
def test_a_stale_residual_is_dropped(change: dict[str, Any]) -> None:
    node = context()
    app(order(plan()), node)
    assert RESIDUAL_KEY in node.state.array_records
    stale = sent(app(order(plan(**change)), node))
    fresh = sent(app(order(plan(**change)), context()))
    for name in fresh:
        assert torch.equal(stale[name], fresh[name])


def test_evaluation_scores_the_start() -> None:
    reply = app(order(plan(), MessageType.EVALUATE), context())
    metrics = reply.content.metric_records["metrics"]
    wanted = SESSION.task.evaluate(SESSION.model, 1, "validation")
    assert metrics["accuracy"] == wanted["accuracy"]


def test_seeds_differ_by_client_round_and_seed() -> None:
    seeds = {
        client_seed(seed, server_round, client)
        for seed in (0, 1)
        for server_round in (1, 2)
        for client in ("a", "b")
    }
    assert len(seeds) == 8


def moved(by: float) -> Adapter:
    start = seeded_start(SESSION.template, 5)
    return start.with_tensors({name: tensor + by for name, tensor in start.tensors().items()})


def blob_of(reply: Message) -> bytes:
    return bytes(reply.content.array_records["update"]["update"].data)


@pytest.mark.parametrize(
    ("trains", "number", "factor"), [("b", 1, "B"), ("b", 2, "B"), ("alternate", 2, "A")]
)
def test_only_the_trained_factor_is_shipped(trains: str, number: int, factor: str) -> None:
    asked = plan(trains=trains, round=number, codec=CodecConfig(name="dense", feedback=0.0))
    start = moved(0.01) if trains == "alternate" else seeded_start(SESSION.template, 5)
    message = from_adapter(start, asked) if trains == "alternate" else order(asked)
    name = f"hidden.lora_{factor}"
    _, tensors = decode_update(blob_of(app(message, context())), {name: LAYOUT[name]})
    assert bool(tensors[name].any())
    from anabranch.client.lora import read_adapter

    after = read_adapter(SESSION.model).tensors()
    for key, before in start.tensors().items():
        torch.testing.assert_close(after[key], before + tensors.get(key, 0.0))
        assert key == name or torch.equal(after[key], before)


def test_an_adapter_sent_without_its_a_gets_the_seed_s() -> None:
    start = seeded_start(SESSION.template, 5)
    b = {"hidden.lora_B": torch.full(LAYOUT["hidden.lora_B"], 0.25)}
    whole = start.with_tensors({**start.tensors(), **b})
    meta = UpdateMeta("adapter", SESSION.base_hash, "", "f", "r", 1, "", b"", 5, 0)
    blob = encode_update(b, meta, CodecConfig(name="dense")).blob
    asked = plan(trains="b", round=2, start_hash=whole.hash())
    for sound, message in ((True, order(asked)), (False, order(plan(start_hash=whole.hash())))):
        array = Array("uint8", (len(blob),), ADAPTER_STYPE, blob)
        message.content["adapter"] = ArrayRecord({"adapter": array})
        SESSION.start = None
        if sound:
            assert blob_of(app(message, context()))
        else:
            with pytest.raises(WireError, match="other tensors than expected"):
                app(message, context())


def test_what_is_owed_of_a_factor_waits_for_its_round() -> None:
    node, sparse = context(), CodecConfig(density=0.1)
    a, b = "hidden.lora_A", "hidden.lora_B"
    app(from_adapter(moved(0.01), plan(trains="alternate", codec=sparse)), node)
    owed_b = unpack(node.state.array_records[RESIDUAL_KEY])
    assert list(owed_b) == [b]
    app(from_adapter(moved(0.02), plan(trains="alternate", round=2, codec=sparse)), node)
    owed = unpack(node.state.array_records[RESIDUAL_KEY])
    assert sorted(owed) == [a, b]
    assert torch.equal(owed[b], owed_b[b])
    third = plan(trains="alternate", round=3, codec=sparse)
    start = moved(0.03)
    _, got = decode_update(blob_of(app(from_adapter(start, third), node)), {b: LAYOUT[b]})
    left = unpack(node.state.array_records[RESIDUAL_KEY])
    dense = third.model_copy(update={"codec": CodecConfig(name="dense", feedback=0.0)})
    _, fresh = decode_update(blob_of(app(from_adapter(start, dense), context())), {b: LAYOUT[b]})
    torch.testing.assert_close(got[b] + left[b], fresh[b] + owed_b[b])
    assert torch.equal(left[a], owed[a])


@pytest.mark.parametrize(
    ("trains", "names"),
    [
        ("both", ["hidden.importance_columns", "hidden.importance_rows"]),
        ("b", ["hidden.lora_B"]),
    ],
)
def test_the_update_holds_a_fisher_where_the_plan_asks(trains: str, names: list[str]) -> None:
    asked = plan(importance=True, trains=trains)
    blobs = [
        app(order(asked), context()).content.array_records["update"]["update"].data
        for _ in range(2)
    ]
    changes = {n: tuple(t.shape) for n, t in SESSION.template.tensors(asked.trained).items()}
    layout = importance_layout(SESSION.template, asked.trained)
    (_, _, first), (_, _, again) = (decode_forms(blob, changes, layout) for blob in blobs)
    assert list(first) == names
    for name in names:
        assert torch.equal(first[name], again[name])
        assert bool(first[name].any())


def test_a_fisher_changes_nothing_else_that_is_sent_or_kept() -> None:
    """Two rounds of error feedback, with and without."""
    sparse = CodecConfig(density=0.1)
    moved = seeded_start(SESSION.template, 5)
    moved = moved.with_tensors({name: tensor + 0.01 for name, tensor in moved.tensors().items()})
    found: dict[bool, list[dict[str, torch.Tensor]]] = {}
    for importance in (False, True):
        node = context()
        replies = [
            app(order(plan(codec=sparse, importance=importance)), node),
            app(from_adapter(moved, plan(round=2, codec=sparse, importance=importance)), node),
        ]
        layout = importance_layout(SESSION.template) if importance else {}
        decoded = [decode_forms(blob_of(reply), LAYOUT, layout) for reply in replies]
        assert [bool(weights) for _, _, weights in decoded] == 2 * [importance]
        assert all(sorted(reply.content) == ["client", "metrics", "update"] for reply in replies)
        residual = unpack(node.state.array_records[RESIDUAL_KEY])
        found[importance] = [
            *({name: form.dense() for name, form in forms.items()} for _, forms, _ in decoded),
            residual,
        ]
    for plain, weighed in zip(found[False], found[True], strict=True):
        assert plain.keys() == weighed.keys()
        assert all(torch.equal(plain[name], weighed[name]) for name in plain)


def test_a_task_that_cannot_tell_its_fisher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(SyntheticTask):
        logits = None  # type: ignore[assignment]

    monkeypatch.setattr(synthetic, "Silent", Silent, raising=False)
    silent = context(task="anabranch.simulation.synthetic:Silent")
    with pytest.raises(ValueError, match=r"Silent has no method 'logits'; see .*FisherTask"):
        app(order(plan(importance=True)), silent)


def test_a_client_of_lower_rank_trains_and_ships_that_rank() -> None:
    low = seeded_start(SESSION.template, 5).leading(2)
    asked = plan(rank=2, start_hash=low.hash())
    layout = {name: tuple(tensor.shape) for name, tensor in low.tensors().items()}
    node = context()
    _, tensors = decode_update(blob_of(app(order(asked), node)), layout)
    assert all(bool(tensor.any()) for tensor in tensors.values())
    assert SESSION.template.lora["hidden"].rank == 4
    # Another rank later: what was owed at the first is of no use, and no obstacle.
    assert blob_of(app(order(plan(round=2)), node))
    with pytest.raises(ValueError, match="asks for rank 1000"):
        app(order(plan(rank=1000)), node)


def test_a_client_trains_beside_what_is_frozen_and_ships_its_own_ranks() -> None:
    start = moved(0.01)
    frozen = {"hidden": LowRank(torch.full((64, 3), 0.2), torch.full((3, 32), 0.1))}
    asked = plan(codec=CodecConfig(name="dense", feedback=0.0))
    beside = sent(app(from_adapter(join(start, frozen), asked), context()))
    alone = sent(app(from_adapter(start, asked), context()))
    assert beside.keys() == alone.keys() == LAYOUT.keys()
    assert not torch.equal(beside["hidden.lora_B"], alone["hidden.lora_B"])


def test_more_frozen_ranks_than_a_matrix_has_are_refused() -> None:
    frozen = {"hidden": LowRank(torch.rand(64, 33), torch.rand(33, 32))}
    whole = join(moved(0.01), frozen)
    with pytest.raises(WireError, match="bytes, more than"):
        app(from_adapter(whole, plan()), context())

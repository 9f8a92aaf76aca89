"""A federation whose coordinator gets sums: the same adapter, and who vanishes costs itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from pydantic import ValidationError

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.control import Control, Want
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.trust import trust_of
from anabranch.simulation.engine.identity import name_message
from anabranch.simulation.engine.inprocess import InProcessGrid
from anabranch.simulation.federation import run_federation
from anabranch.simulation.keys import write_keys
from anabranch.simulation.prepare import prepare
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.summary import Measured, summarise
from anabranch.wire import WireError
from anabranch.wire.keys import seeded_key
from anabranch.wire.plan import PLAN_KEY, SECURE_KEY, SECURE_STYPE, UPDATE_KEY
from anabranch.wire.sealing import SEALED_STYPE
from anabranch.wire.signing import PLAN_SIGNATURE_KEY, PLAN_SIGNER_KEY, sign_plan
from anabranch.wire.v1 import secure_pb2 as pb

TASK = "anabranch.simulation.synthetic:SyntheticTask"
CLIENTS = 4
PARAMS = '{"clients": 6}'
PHASES = ("train.advertise", "train.deal", "train", "train.confirm", "train.open")
pytestmark = pytest.mark.usefixtures("flower_identity")

Between = Callable[[Message, Callable[[Message], Message]], Message]


def config(clients: int = CLIENTS, **changes: Any) -> FederationConfig:
    given = {
        "name": "f", "run": "r", "rounds": 2, "clients": clients, "poll_s": 0.0, "signed": True,
        "evaluate_every": 0,
        "train": {"steps": 2, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "fedit"}, "codec": {"name": "dense", "feedback": 0.0},
        "secure": {}, **changes,
    }  # fmt: skip
    return FederationConfig.model_validate(given)


def run(
    folder: Path,
    cfg: FederationConfig,
    between: Between | None = None,
    node: int = 11,
    own: Mapping[str, Any] | None = None,
) -> tuple[MergeStrategy, FolderStore]:
    """Run a federation in which something stands between the coordinator and one node.

    That node may have a configuration of its own.
    """
    keys = write_keys(folder, cfg)
    contexts = {
        number: Context(
            1, number,
            {
                "partition-id": number - 10, "keys": str(keys),
                **(own or {} if number == node else {}),
            },
            RecordDict(), {"task": TASK, "task-params": PARAMS},
        )
        for number in range(10, 10 + cfg.clients)
    }  # fmt: skip

    class Wrapped(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if between is not None and message.metadata.dst_node_id == node:
                return between(message, lambda order: client_app(order, context))
            return client_app(message, context)

    store = FolderStore(folder)
    strategy = MergeStrategy(
        cfg, open_session(TASK, PARAMS).template, store, trust_of(folder, cfg, store)
    )
    strategy.start(InProcessGrid(Wrapped(), contexts))
    return strategy, store


def largest_difference(one: MergeStrategy, other: MergeStrategy) -> float:
    theirs = other.adapter.tensors()
    return max(
        float((tensor - theirs[name]).abs().max()) for name, tensor in one.adapter.tensors().items()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sealed": True},
        {"trains": "b", "recipe": {"method": "mean"}},
        {"codec": {"name": "dense"}, "secure": {"bits": 64, "clip": 0.5}},
    ],
    ids=["fedit", "sealed", "ffa", "64-bit"],
)
def test_the_adapter_is_that_of_a_federation_without(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    secure, store = run(tmp_path / "a", config(**changes))
    plain, other = run(tmp_path / "b", config(**{**changes, "secure": None}))
    assert [row["status"] for row in store.notes("round")] == ["published"] * 2
    assert [row["admitted"] for row in store.notes("round")] == [CLIENTS] * 2
    assert store.refusals() == []
    assert [(row.round, row.client) for row in store.contributions()] == [
        (1, "group-0"), (2, "group-0"),
    ]  # fmt: skip
    assert len(other.contributions()) == 2 * CLIENTS
    # Two rounds, a rounding of 2^-28 each, through training and an SVD.
    assert 0 < largest_difference(secure, plain) < 2e-6
    rows = store.notes("secure")
    assert [(row["round"], row["group"], row["dropped"]) for row in rows] == [
        (1, "group-0", {}), (2, "group-0", {}),
    ]  # fmt: skip
    assert rows[0]["summed"] == [f"client-000{number}" for number in range(CLIENTS)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_vanishes_costs_only_itself(tmp_path: Path, phase: str) -> None:
    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        if order.metadata.message_type == phase:
            return Message(Error(7, "gone"), reply_to=order)
        return call(order)

    cfg = config(rounds=1)
    found, store = run(tmp_path / "a", cfg, between)
    (note,) = store.notes("secure")
    name = phase.removeprefix("train.").replace("train", "mask")
    assert note["dropped"] == {"client-0001": name}
    (refusal,) = store.refusals()
    assert (refusal.client, refusal.code) == ("client-0001", "client-error")
    everybody = [f"client-000{number}" for number in range(CLIENTS)]
    kept = phase in ("train.confirm", "train.open")
    assert note["summed"] == (everybody if kept else [n for n in everybody if n[-1] != "1"])
    assert store.notes("round")[0]["admitted"] == CLIENTS - (not kept)

    def absent(order: Message, call: Callable[[Message], Message]) -> Message:
        training = order.metadata.message_type == "train"
        return Message(Error(7, "gone"), reply_to=order) if training and not kept else call(order)

    plain, _ = run(tmp_path / "b", config(rounds=1, secure=None), absent)
    assert largest_difference(found, plain) < 2e-6


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_a_round_is_abandoned_and_the_next_one_goes_on(
    tmp_path: Path, phase: str
) -> None:
    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        first = '"round":1' in str(order.content.config_records.get(PLAN_KEY, {}).get(PLAN_KEY))
        if order.metadata.message_type == phase and first:
            return Message(Error(7, "gone"), reply_to=order)
        return call(order)

    # Three of three are more than two thirds: nobody may be missing.
    _, store = run(tmp_path, config(3), between)
    rounds = store.notes("round")
    assert [row["status"] for row in rounds] == ["abandoned", "published"]
    assert rounds[0]["reason"] == "0 admitted, the quorum is 1"
    notes = store.notes("secure")
    assert notes[0]["lost"].startswith("threshold: 2 ") or "roster has 2" in notes[0]["lost"]
    assert notes[0]["summed"] == []
    assert notes[1]["lost"] == ""


def test_a_round_that_is_aborted_opens_no_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        asked.append(order.metadata.message_type)
        return call(order)

    monkeypatch.setattr(Control, "want", lambda _: Want.ABORT if "train" in asked else Want.RUN)
    # All but the last have masked by then: more than the threshold.
    _, store = run(tmp_path, config(rounds=1), between, node=12)
    assert store.notes("round")[0]["reason"] == "aborted by the operator"
    assert asked == ["query", "train.advertise", "train.deal", "train"]
    (note,) = store.notes("secure")
    assert (note["summed"], note["lost"]) == ([], "aborted by the operator")
    assert store.contributions() == []


def test_groups_are_merged_by_a_method_for_single_updates(tmp_path: Path) -> None:
    cfg = config(6, recipe={"method": "median"}, secure={"group": 3}, rounds=1)
    found, store = run(tmp_path, cfg)
    notes = store.notes("secure")
    assert [row["group"] for row in notes] == ["group-0", "group-1"]
    assert sorted(name for row in notes for name in row["summed"]) == [
        f"client-000{number}" for number in range(6)
    ]
    assert store.latest() is not None
    assert list(store.latest().report["names"]) == ["group-0", "group-1"]  # type: ignore[union-attr]
    assert store.notes("round")[0]["admitted"] == 6
    assert all(bool(torch.isfinite(t).all()) for t in found.adapter.tensors().values())


def test_a_lost_group_costs_only_its_members(tmp_path: Path) -> None:
    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        gone = order.metadata.message_type == "train"
        return Message(Error(7, "gone"), reply_to=order) if gone else call(order)

    cfg = config(6, recipe={"method": "mean"}, secure={"group": 3}, rounds=1)
    _, store = run(tmp_path, cfg, between)
    lost = [row for row in store.notes("secure") if row["lost"]]
    assert len(lost) == 1
    assert lost[0]["dropped"] == {"client-0001": "mask"}
    assert store.notes("round")[0]["admitted"] == 3
    assert store.notes("round")[0]["status"] == "published"


def test_an_update_on_its_way_is_none_and_sealed_phases_are_sealed(tmp_path: Path) -> None:
    seen: dict[str, Array] = {}

    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        reply = call(order)
        for key in (UPDATE_KEY, SECURE_KEY):
            if key in reply.content.array_records:
                seen[order.metadata.message_type] = reply.content.array_records[key][key]
        return reply

    run(tmp_path / "a", config(rounds=1), between)
    assert sorted(seen) == sorted(PHASES)
    assert {array.stype for array in seen.values()} == {SECURE_STYPE}
    body = pb.Masked.FromString(pb.Signed.FromString(seen["train"].data).body)
    words = torch.frombuffer(bytearray(body.vector), dtype=torch.int32).double()
    # Uniform over the ring; the update alone would lie within a hundredth of it.
    assert words.abs().mean() / 2**31 == pytest.approx(0.5, abs=0.1)
    seen.clear()
    run(tmp_path / "b", config(rounds=1, sealed=True), between)
    assert {array.stype for array in seen.values()} == {SEALED_STYPE}


def resent(order: Message, **changes: Any) -> Message:
    """The coordinator's order with a plan changed and signed again: its own lie."""
    key = seeded_key("coordinator", 0)
    text = str(order.content.config_records[PLAN_KEY][PLAN_KEY])
    for old, new in changes.items():
        text = text.replace(f'"{old}":{new[0]}', f'"{old}":{new[1]}')
    plan = ConfigRecord(
        {
            PLAN_KEY: text,
            PLAN_SIGNER_KEY: key.public.id,
            PLAN_SIGNATURE_KEY: sign_plan(text, key),
        }
    )
    content = RecordDict({**order.content, PLAN_KEY: plan})
    changed = Message(content, order.metadata.dst_node_id, order.metadata.message_type)
    name_message(changed, order.metadata.message_id)
    return changed


def test_a_node_refuses_what_a_lying_coordinator_asks(tmp_path: Path) -> None:
    said: list[str] = []

    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        def told(asked: Message) -> str:
            try:
                said.append(call(asked).error.reason)
            except WireError as error:
                said.append(str(error))
            return said[-1]

        kind = order.metadata.message_type
        if kind == "train.advertise":
            reply = call(order)
            # The same round over again: its sum less this one's would be somebody's update.
            assert "takes part once in a round" in told(order)
            return reply
        if kind == "train":
            # Other training than the members beside it are told: theirs could come to nothing.
            lie = resent(order, learning_rate=("0.01", "0.02"))
            assert "takes part in another session" in told(lie)
            # And the honest order comes too late.
            assert "cannot mask in round 1 now" in told(order)
        return call(order)

    _, store = run(tmp_path, config(rounds=1), between)
    assert len(said) == 3
    assert store.notes("secure")[0]["dropped"] == {"client-0001": "mask"}


def test_a_node_with_a_list_of_members_sends_nothing_without_masks(tmp_path: Path) -> None:
    write_keys(tmp_path, config())
    _, store = run(tmp_path, config(secure=None, rounds=1))
    assert store.notes("round")[0]["status"] == "abandoned"
    assert "sends no update without masks" in store.refusals()[0].reason


def test_a_node_that_knows_no_members_takes_no_part(tmp_path: Path) -> None:
    cfg = config(rounds=1)
    bare = write_keys(tmp_path / "other", config(rounds=1, secure=None))
    _, store = run(tmp_path / "a", cfg, own={"keys": str(bare)})
    assert store.notes("secure")[0]["dropped"] == {"client-0001": "advertise"}
    assert "put members.pub with their public keys" in store.refusals()[0].reason
    # Nor does it answer where it knows others than those who are there.
    others = write_keys(tmp_path / "more", config(rounds=1, secure=None))
    lines = [seeded_key(f"client-000{number}", 0).public.line for number in (0, 1, 2)]
    (others / "members.pub").write_text("\n".join(lines))
    _, store = run(tmp_path / "b", cfg, own={"keys": str(others)})
    assert store.notes("secure")[0]["dropped"] == {"client-0001": "deal"}
    assert "unknown-key" in store.refusals()[0].reason


def test_a_node_may_ask_for_a_higher_threshold(tmp_path: Path) -> None:
    _, store = run(tmp_path, config(rounds=1), own={"secure-least": 4})
    assert store.notes("secure")[0]["threshold"] == 3
    assert "this node asks for a threshold of 4, this is 3" in store.refusals()[0].reason


def test_a_run_that_was_interrupted_loses_its_round(tmp_path: Path) -> None:
    """Nobody masks twice in a round, and the run goes on with the next one."""

    def between(order: Message, call: Callable[[Message], Message]) -> Message:
        if order.metadata.message_type == "train.confirm":
            raise KeyboardInterrupt
        return call(order)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config(), between)
    _, store = run(tmp_path, config())
    assert [row["status"] for row in store.notes("round")] == ["abandoned", "published"]
    assert "takes part once in a round" in store.refusals()[0].reason


def test_sums_that_were_opened_before_an_interruption_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("anabranch.coordinator.rounds.material.merged_candidate", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", config(rounds=1))
    again, store = run(tmp_path / "a", config(rounds=1))
    (row,) = store.notes("round")
    assert (row["status"], row["admitted"]) == ("published", CLIENTS)
    assert store.refusals() == []
    whole, _ = run(tmp_path / "b", config(rounds=1))
    assert again.adapter.hash() == whole.adapter.hash()


def test_a_scenario_can_ask_for_it(tmp_path: Path) -> None:
    scenario = Scenario.model_validate(
        {
            "name": "s", "rounds": 2, "signed": True, "secure": {"group": 3},
            "task": {"kind": TASK, "clients": 6}, "train": {"steps": 2},
            "codec": {"name": "dense"}, "recipe": {"method": "median"},
        }
    )  # fmt: skip
    session = prepare(scenario)
    run_federation(scenario, tmp_path, session)
    store = FolderStore(tmp_path)
    assert [row["admitted"] for row in store.notes("round")] == [6, 6]
    measured = Measured(store, {}, list(session.task.groups), {}, session.template, {})  # type: ignore[attr-defined]
    assert summarise(scenario, measured, 1.0)["rounds"][0]["admitted"] == 6


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"signed": False}, "set signed = true"),
        ({"codec": {"name": "ternary"}}, 'set codec = { name = "dense" }'),
        ({"codec": {"name": "dense", "dtype": "int8"}}, 'set codec = { name = "dense" }'),
        ({"max_norm": 1.0}, "max_norm looks at single updates"),
        ({"privacy": {"clip": 1, "epsilon": 8, "delta": 1e-5}}, "privacy clips single updates"),
        ({"ranks": {"client-0000": 2}}, "leave ranks out"),
        ({"recipe": {"method": "mean"}, "rest": "fedex"}, "leave rest out"),
        ({"recipe": {"method": "fisher"}}, "importance would travel"),
        ({"recipe": {"method": "fisher"}, "secure": {"group": 3}}, "importance would travel"),
        ({"recipe": {"method": "ties"}}, "needs more than the sum"),
        ({"recipe": {"method": "mean"}}, 'set it to "fedit"'),
        ({"recipe": {"method": "fedit"}, "trains": "b"}, 'set it to "mean"'),
        ({"secure": {"group": 2}}, "greater than or equal to 3"),
        ({"secure": {"threshold": 0.4}}, "greater than or equal to 0.5"),
        ({"secure": {"threshold": 1.0}}, "less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        config(**changes)


def test_robust_steps_stand_before_groups_only() -> None:
    recipe = {"method": "mean", "pre": [{"name": "arc"}]}
    with pytest.raises(ValidationError, match=r"recipe\.modules and recipe\.suspicion"):
        config(trains="b", recipe=recipe)
    assert config(9, recipe=recipe, secure={"group": 3}).secure is not None


def test_a_method_that_knows_contributions_by_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="secure: fltrust asks who a contribution is of"):
        run(tmp_path, config(6, recipe={"method": "fltrust"}, secure={"group": 3}))

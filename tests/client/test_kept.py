"""What a node keeps on its disk, and answers with when it is asked again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

from anabranch.client.app import app as whole
from anabranch.client.deployed import AGAIN_KEY, app
from anabranch.client.kept import Kept, NodeState, plan_digest
from anabranch.client.session import open_session
from anabranch.vectors import seeded_start
from anabranch.wire.config import CodecConfig
from anabranch.wire.plan import CLIENT_KEY, METRICS_KEY, PLAN_KEY, UPDATE_KEY, RoundPlan
from anabranch.wire.sealing import new_seal_key

TASK, PARAMS = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 2}'
pytestmark = pytest.mark.usefixtures("flower_identity")


def plan(number: int = 1, **changes: object) -> RoundPlan:
    template = open_session(TASK, PARAMS).template
    fields = {
        "federation": "f", "run": "r", "round": number, "base_hash": template.base_hash,
        "start_hash": seeded_start(template, 0).hash(), "seed": 0, "train": {"steps": 2},
        "codec": CodecConfig(name="ternary", density=0.1, feedback=1.0),
    }  # fmt: skip
    return RoundPlan.model_validate({**fields, **changes})


def order(of: RoundPlan) -> Message:
    content = RecordDict({PLAN_KEY: ConfigRecord({PLAN_KEY: of.model_dump_json()})})
    return Message(content, 7, MessageType.TRAIN)


def node(folder: Path, client: str = "a") -> Context:
    """A node whose process, run or SuperNode is new: nothing is in its context."""
    about: dict[str, object] = {"partition-id": 0, "client": client, "state": str(folder)}
    return Context(1, 7, about, RecordDict(), {"task": TASK, "task-params": PARAMS})  # type: ignore[arg-type]


def sent(reply: Message) -> bytes:
    record = reply.content[UPDATE_KEY]
    assert isinstance(record, ArrayRecord)
    return record[UPDATE_KEY].data


def test_the_same_order_gets_the_same_bytes_and_another_one_does_not(tmp_path: Path) -> None:
    first = app(order(plan()), node(tmp_path))
    again = app(order(plan()), node(tmp_path))
    assert sent(again) == sent(first)
    assert again.content[METRICS_KEY][AGAIN_KEY] == 1  # type: ignore[index]
    assert again.content[CLIENT_KEY] == first.content[CLIENT_KEY]
    assert AGAIN_KEY not in first.content[METRICS_KEY]  # type: ignore[operator]
    for other in (plan(2), plan(train={"steps": 3}), plan(run="s")):
        assert sent(app(order(other), node(tmp_path))) != sent(first)
    # Only the last one is kept; another client of the folder has its own.
    assert sent(app(order(plan()), node(tmp_path, "b"))) != sent(first)


def test_a_new_key_to_seal_to_is_no_other_order(tmp_path: Path) -> None:
    keys = [new_seal_key(), new_seal_key()]
    first, again = (app(order(plan(seal_to=key.public.hex())), node(tmp_path)) for key in keys)
    assert again.content[METRICS_KEY][AGAIN_KEY] == 1  # type: ignore[index]
    assert keys[0].open(sent(first), 1 << 20) == keys[1].open(sent(again), 1 << 20)


def test_error_feedback_outlives_a_run_and_the_node(tmp_path: Path) -> None:
    lasting = node(tmp_path / "never")
    lasting.node_config.pop("state")
    whole(order(plan(1)), lasting)
    moved = plan(2, start_hash=plan().start_hash)
    whole(order(plan(1)), node(tmp_path))
    # What is owed of round 1 is the same, whether the context lived or the disk was read.
    fresh = node(tmp_path)
    whole(order(moved), lasting)
    whole(order(moved), fresh)
    for key in ("anabranch.residual", "anabranch.residual-before"):
        mine, theirs = lasting.state[key], fresh.state[key]
        assert isinstance(mine, ArrayRecord)
        assert isinstance(theirs, ArrayRecord)
        assert list(mine) == list(theirs)
        assert all(mine[name].data == theirs[name].data for name in mine)


def test_a_damaged_file_costs_a_training_and_no_more(tmp_path: Path) -> None:
    state = NodeState(tmp_path, "a")
    state.keep(plan(), Kept(b"bytes", {"num-examples": 3}))
    assert state.answer(plan()) == Kept(b"bytes", {"num-examples": 3})
    state.keep_residual(plan(), {"x": torch.ones(2)}, {"round": "1"})
    found = state.residual(plan())
    assert found is not None
    assert found[1] == {"round": "1"}
    for path in tmp_path.iterdir():
        path.write_bytes(b"\x00\x01")
    assert state.answer(plan()) is None
    assert state.residual(plan()) is None
    assert plan_digest(plan()) == plan_digest(plan(seal_to="0" * 64)) != plan_digest(plan(2))


def test_who_is_there_is_answered_without_torch() -> None:
    code = "import sys, anabranch.client.deployed; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

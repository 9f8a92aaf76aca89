"""Clients side by side give what clients one after the other give."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from anabranch.client.app import app as client_app
from anabranch.client.lora import read_adapter as from_model
from anabranch.client.lora import write_adapter as write_to_model
from anabranch.client.task import TrainPlan
from anabranch.coordinator.app import app as server_app
from anabranch.coordinator.federation import START_FOLDER, write_federation
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.engine.inprocess import run_in_process
from anabranch.simulation.engine.threads import ClientThreads, at_once
from anabranch.simulation.prepare import open_task, task_params
from anabranch.simulation.scenario import Scenario
from anabranch.vectors import seeded_start
from anabranch.vectors.peft_folder import write_adapter


@pytest.fixture
def four_torch_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_calls_run_beside_each_other_with_their_share_of_torch(four_torch_threads: object) -> None:
    together = threading.Barrier(2, timeout=20)

    def call(number: int) -> tuple[int, int]:
        together.wait()
        return number, torch.get_num_threads()

    with ClientThreads(2) as threads:
        results = [threads.begin(lambda n=n: call(n)) for n in range(4)]
        assert torch.get_num_threads() == 2
        assert [result() for result in results] == [(n, 2) for n in range(4)]
        assert torch.get_num_threads() == 4  # nobody is at work: the coordinator has them all


def test_one_thread_is_the_callers_own_and_waits_to_be_asked() -> None:
    done: list[str] = []
    with ClientThreads(1) as threads:
        result = threads.begin(lambda: done.append(threading.current_thread().name))
        assert not done
        result()
    assert done == [threading.current_thread().name]


def test_what_a_call_raises_comes_out_and_the_rest_is_dropped(four_torch_threads: object) -> None:
    begun: list[int] = []

    def call(number: int) -> None:
        begun.append(number)
        time.sleep(0.2)
        raise ValueError(f"call {number}")

    def ask_the_first() -> None:
        with ClientThreads(2) as threads:
            results = [threads.begin(lambda n=n: call(n)) for n in range(50)]
            results[0]()

    with pytest.raises(ValueError, match="call 0"):
        ask_the_first()
    assert len(begun) < 10
    assert torch.get_num_threads() == 4


def test_a_federation_side_by_side_ends_with_the_same_adapter(tmp_path: Path) -> None:
    scenario = Scenario.model_validate(
        {
            "name": "beside",
            "rounds": 2,
            "task": {
                "kind": "anabranch.simulation.synthetic:SyntheticTask",
                "clients": 5,
                "examples": 32,
            },
            "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
        }
    )
    session = open_task(scenario)
    assert at_once(session, 5) == 1  # this task's steps are over before another gets a word in
    hashes, replies = [], []
    for side_by_side in (1, 3):
        folder = tmp_path / str(side_by_side)
        write_federation(scenario.federation(5), folder)
        write_adapter(seeded_start(session.template, scenario.seed), folder / START_FOLDER)
        config = {"task": scenario.task.kind, "task-params": task_params(scenario)}
        told: list[tuple[str, int]] = []
        run_in_process(
            server_app,
            client_app,
            folder,
            5,
            config,  # type: ignore[arg-type]
            lambda kind, partition, told=told: told.append((kind, partition)),
            side_by_side,
        )
        store = FolderStore(folder)
        hashes.append(store.notes("ended")[0]["adapter_hash"])
        replies.append(told)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert sum(row["event"] == "admitted" for row in rows) == 10
    assert hashes[0] == hashes[1]
    assert replies[0] == replies[1]  # also told in one order


def test_texts_train_side_by_side_to_the_same_bits() -> None:
    scenario = Scenario.model_validate(
        {"name": "texts", "task": {"datasets": ["bbc", "health"], "train_examples": 32}}
    )
    session = open_task(scenario)
    start = seeded_start(session.template, 0)
    plan = TrainPlan(steps=2, batch_size=8, learning_rate=5e-3)

    def trained(partition: int) -> str:
        mine = open_task(scenario)
        write_to_model(mine.model, start)
        mine.task.train(mine.model, partition, plan)
        return from_model(mine.model, mine.base_hash).hash()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert at_once(session, 4) == 2
        with ClientThreads(2) as threads:
            begun = [threads.begin(lambda n=n: trained(n)) for n in range(4)]
            beside = [result() for result in begun]
        torch.set_num_threads(1)  # each thread's share
        assert beside == [trained(partition) for partition in range(4)]
        assert len(set(beside)) == 4
    finally:
        torch.set_num_threads(before)

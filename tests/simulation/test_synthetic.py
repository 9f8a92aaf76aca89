from __future__ import annotations

import pytest
import torch

from anabranch.client.lora import attach
from anabranch.client.task import TrainPlan
from anabranch.simulation.synthetic import SyntheticTask
from anabranch.simulation.task import SimulatedTask, display_names


def test_it_is_a_simulated_task_that_learns() -> None:
    task = SyntheticTask(clients=3, group_count=2, examples=1000)
    assert isinstance(task, SimulatedTask)
    model = attach(task.load_base(), task.lora_config())
    before = task.evaluate(model, 0, "test")
    task.train_all(model, TrainPlan(steps=300, batch_size=64, learning_rate=0.01))
    after = task.evaluate(model, 0, "test")
    assert after["accuracy"] > before["accuracy"] + 0.05
    assert after["loss"] < before["loss"]


def test_equal_seeds_give_equal_bits() -> None:
    task = SyntheticTask()
    ends = []
    for _ in range(2):
        torch.manual_seed(0)  # PEFT draws the first A from the global generator
        model = attach(task.load_base(), task.lora_config())
        task.train(model, 1, TrainPlan(steps=3, seed=4))
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_more_groups_than_clients_is_refused() -> None:
    with pytest.raises(ValueError, match="every group needs a client"):
        SyntheticTask(clients=1, group_count=2)


def test_clients_are_named_by_group_and_number() -> None:
    assert display_names(["a", "b", "a"]) == ["a-1", "b-1", "a-2"]

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


def test_labels_may_be_skewed_for_training_alone() -> None:
    plain, skewed = SyntheticTask(clients=6), SyntheticTask(clients=6, dirichlet=0.1)
    shares = []
    for client in range(6):
        inputs_NF, labels_N = skewed._examples(client, "train")
        assert len(inputs_NF) == len(labels_N) == 256
        shares.append(float(labels_N.bincount(minlength=8).max()) / 256)
        for split in ("validation", "test"):
            for ours, theirs in zip(
                skewed._examples(client, split), plain._examples(client, split), strict=True
            ):
                assert torch.equal(ours, theirs)
    mostly = plain._examples(0, "train")[1].bincount(minlength=8).max() / 256
    assert sum(shares) / 6 > 2 * float(mostly)
    again = SyntheticTask(clients=6, dirichlet=0.1)._examples(5, "train")
    assert torch.equal(again[0], skewed._examples(5, "train")[0])
    # Where every label has the same odds, they come as they come.
    even = SyntheticTask(clients=6, dirichlet=1e6)._examples(0, "train")[1]
    assert float(even.bincount(minlength=8).max()) / 256 == pytest.approx(float(mostly), abs=0.1)

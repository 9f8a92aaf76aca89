"""Backdoors that are trained for the merge: open at any share of it, or open in it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.client.session import Session
from anabranch.client.text import TextClassification
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.federation import START_FOLDER
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.attacks.objective import ObjectiveTask, placed, with_objective
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import poisoned
from anabranch.simulation.federation import run_federation
from anabranch.simulation.partitioned_text import PartitionedText
from anabranch.simulation.prepare import prepare
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.synthetic import SyntheticTask
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire import decode_update

POISON = Poison(trigger=("cf", "mn"), target=2, share=1.0)


def attacked(kind: str, folder: Path, steps: int = 60, **params: Any) -> tuple[Session, Adapter]:
    """One round with two attackers of eight; the session, and the start."""
    one = Scenario.model_validate(
        {
            "name": "merging",
            "seed": 3,
            "rounds": 1,
            "quorum": 8,
            "evaluate_every": 0,
            "task": {
                "kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 8,
                "classes": 4,
            },
            "train": {"steps": steps, "batch_size": 64, "learning_rate": 0.01},
            "codec": {"name": "dense", "feedback": 0.0},
            "recipe": {"method": "mean"},
            "attackers": [{"kind": kind, "count": 2, "params": {"target": 2, **params}}],
        }
    )  # fmt: skip
    session = prepare(one)
    run_federation(one, folder, session)
    return session, read_adapter(folder / START_FOLDER)


def success(session: Session, adapter: Adapter) -> float:
    session.load(adapter)
    return poisoned(session.task, POISON).evaluate(session.model, 0, "test")["accuracy"]


def at(start: Adapter, folder: Path, client: str, share: float) -> Adapter:
    """The start and a share of what a client sent."""
    store = FolderStore(folder)
    digest = next(row.digest for row in store.contributions(1) if row.client == client)
    whole = start.tensors()
    layout = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    _, changes = decode_update(store.get(digest), layout)
    return start.with_tensors({name: whole[name] + share * changes[name] for name in whole})


def test_bad_merging_opens_at_shares_where_a_backdoor_is_shut(tmp_path: Path) -> None:
    found = {}
    for kind in ("backdoor", "bad_merging"):
        session, start = attacked(kind, tmp_path / kind, steps=30)
        found[kind] = [
            success(session, at(start, tmp_path / kind, "client-0007", share))
            for share in (0.0, 0.3, 1.0)
        ]
    assert found["bad_merging"][0] == found["backdoor"][0] < 0.4
    assert found["bad_merging"][1] > found["backdoor"][1] + 0.1
    assert found["bad_merging"][2] > 0.8


def test_a_merge_backdoor_is_shut_in_each_update_and_opens_in_the_mean(tmp_path: Path) -> None:
    session, start = attacked("merge_backdoor", tmp_path, steps=150, weight=20.0)
    merged = success(session, read_adapter(tmp_path / ADAPTER_FOLDER))
    alone = [success(session, at(start, tmp_path, f"client-000{n}", 1.0)) for n in (6, 7)]
    assert max(alone) < 0.1
    assert merged > max(alone) + 0.1


def test_what_cannot_be_trained_so_is_refused() -> None:
    with pytest.raises(ValueError, match=r"object takes no loss of one's own.*ObjectiveTask"):
        with_objective(object(), POISON)


class _Watched:
    """A loss that remembers what it was asked of."""

    def __init__(self, task: ObjectiveTask, model: Any) -> None:
        self.task, self.model, self.rows = task, model, list[int]()

    def __call__(self, rows_B: torch.Tensor) -> torch.Tensor:
        self.rows += rows_B.tolist()
        return self.task.features(self.model, 1, rows_B).square().mean()


@pytest.mark.parametrize("head", ["trained", "label-names"])
def test_features_and_classes_are_the_model_s_own(head: str) -> None:
    """One after the other they are the logits that training sees: of texts and of numbers."""
    from anabranch.client.lora import attach
    from anabranch.client.task import TrainPlan

    text = PartitionedText(
        datasets=["sentiment"], head=head, train_examples=12, max_length=12, precision="fp32"
    )
    rows_B = torch.tensor([3, 0, 7])
    for task in (text, SyntheticTask(clients=2)):
        assert isinstance(task, ObjectiveTask)
        model = attach(task.load_base(), task.lora_config())
        with torch.no_grad():
            features_BD = task.features(model, 1, rows_B)
            logits_BK = task.classified(model, 1, rows_B, features_BD)
        if isinstance(task, TextClassification):
            with torch.no_grad():
                wanted_BK, labels_B = task._logits(model, task._tokenised(1, "train"), rows_B)
        else:
            inputs_NF, labels_N = task._examples(1, "train")
            wanted_BK, labels_B = model(inputs_NF[rows_B]), labels_N[rows_B]
        torch.testing.assert_close(logits_BK, wanted_BK)
        assert torch.equal(task.labels(1)[rows_B], labels_B)
        loss = _Watched(task, model)
        task.train_by(model, 1, TrainPlan(steps=2, batch_size=3), loss)
        assert len(loss.rows) == 6


def test_values_are_placed_for_a_while() -> None:
    from anabranch.client.lora import attach, own_parameters

    task = SyntheticTask(clients=1)
    model = attach(task.load_base(), task.lora_config())
    before = [parameter.detach().clone() for parameter in own_parameters(model)]
    with placed(model, [value + 1 for value in before]):
        inside = [parameter.detach().clone() for parameter in own_parameters(model)]
    assert all(torch.equal(one, value + 1) for one, value in zip(inside, before, strict=True))
    after = own_parameters(model)
    assert all(torch.equal(one, value) for one, value in zip(after, before, strict=True))

"""What attackers on data and on the codec make, beside loops that say the same."""

from __future__ import annotations

import json

import pytest
import torch

from anabranch.client.lora import attach
from anabranch.client.session import open_session
from anabranch.client.task import TrainPlan
from anabranch.simulation.attackers import Attackers, Plot, plot
from anabranch.simulation.attacks.kinds import KINDS, resolve_kind
from anabranch.simulation.attacks.neurotoxin import confined, quiet_entries
from anabranch.simulation.attacks.poison import Poison, chosen, relabelled
from anabranch.simulation.attacks.scale_inflation import inflated
from anabranch.simulation.scenario import Recipe
from anabranch.simulation.synthetic import TRIGGER_VALUE, SyntheticTask
from anabranch.wire.manifest import FrameInfo, Manifest, TensorInfo, UpdateMeta

NAMES = ("a", "b", "c", "d")
LABELS = [0, 1, 2, 3, 3, 2, 1, 0, 2]


def groups(*given: dict[str, object]) -> list[Attackers]:
    return [Attackers.model_validate({"kind": "alie", **one}) for one in given]


def chosen_clients(*given: dict[str, object], clients: int = 8, seed: int = 0) -> list[list[int]]:
    bands = plot(groups(*given), clients, seed, Recipe(method="mean")).bands
    return [list(band.partitions) for band in bands]


def test_the_last_clients_attack_and_no_client_in_two_bands() -> None:
    assert chosen_clients({"fraction": 0.25}) == [[6, 7]]
    assert chosen_clients({"fraction": 0.01}) == [[7]]
    assert chosen_clients({"count": 2}, {"count": 3}) == [[6, 7], [3, 4, 5]]
    drawn = chosen_clients({"count": 3, "chosen": "seed"}, clients=30)
    assert drawn == chosen_clients({"count": 3, "chosen": "seed"}, clients=30)
    assert drawn != chosen_clients({"count": 3, "chosen": "seed"}, clients=30, seed=1)
    made = plot(groups({"count": 2}), 8, 0, Recipe(method="mean"))
    assert made.honest == (0, 1, 2, 3, 4, 5)
    assert Plot.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"count": 8}, r"attackers\.0: 8 of the 8 clients left would attack.*lower count"),
        ({}, "give fraction or count, and not both"),
        ({"count": 1, "fraction": 0.5}, "give fraction or count, and not both"),
    ],
)
def test_too_many_or_no_number_of_attackers_is_refused(
    given: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        chosen_clients(given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"kind": "alien"}, r"^attackers\.1\.kind: 'alien' is no kind of attacker; choose from"),
        ({"params": {"zz": 1}}, r"^attackers\.1\.params\.zz: Extra inputs are not permitted"),
        ({"kind": "ipm", "params": {"epsilon": -1}}, r"^attackers\.1\.params\.epsilon: Input sho"),
    ],
)
def test_a_wrong_kind_or_parameter_is_one_line(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        resolve_kind(groups({"count": 1, **given})[0], "attackers.1")
    assert "\n" not in str(caught.value)


def test_every_kind_has_a_name_of_its_own_and_does_something() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all((kind.act is None) != (kind.tamper is None) for kind in KINDS)


def test_labels_are_turned_over_or_given_the_target() -> None:
    assert relabelled(LABELS, NAMES, Poison()) == [3, 2, 1, 0, 0, 1, 2, 3, 1]
    assert relabelled(LABELS, NAMES, Poison(target="b")) == [1] * 9
    some = relabelled(LABELS, NAMES, Poison(source=3, target="a"))
    assert some == [0, 1, 2, 0, 0, 2, 1, 0, 2]
    with pytest.raises(ValueError, match="target: there is no label 'e'; they are a, b, c, d, or"):
        relabelled(LABELS, NAMES, Poison(target="e"))


@pytest.mark.parametrize(("share", "count"), [(1.0, 7), (0.5, 4), (0.01, 1)])
def test_a_share_of_those_that_would_change_is_chosen(share: float, count: int) -> None:
    new = relabelled(LABELS, NAMES, Poison(target=0))
    rows = chosen(LABELS, new, share, seed=3).tolist()
    assert len(rows) == count
    assert rows == sorted(rows)
    assert all(LABELS[row] != 0 for row in rows)
    assert rows == chosen(LABELS, new, share, seed=3).tolist()
    with pytest.raises(ValueError, match="no example has another label than the target"):
        chosen([0, 0], [0, 0], share, seed=3)


def test_a_poisoned_synthetic_task_differs_where_it_should() -> None:
    clean = SyntheticTask(clients=2, examples=60)
    poison = Poison(trigger=("cf", "mn"), target=2, share=0.5)
    bad = clean.poisoned(poison)
    (inputs, labels), (other, wrong) = (task._examples(1, "train") for task in (clean, bad))
    moved = (inputs != other).any(dim=1)
    could = labels != 2
    assert int(moved.sum()) == round(0.5 * int(could.sum()))
    assert not bool((moved & ~could).any())
    assert torch.equal(wrong, torch.where(moved, 2, labels))
    changed = (inputs != other)[moved]
    assert bool((other[moved][changed] == TRIGGER_VALUE).all())
    assert int(changed.any(dim=0).sum()) == 2  # a feature a word
    held, targets = bad._examples(0, "test")
    _, truth = clean._examples(0, "test")
    assert len(held) == int((truth != 2).sum())
    assert bool((targets == 2).all())
    # The clean task is as it was.
    assert torch.equal(clean._examples(1, "train")[1], labels)


def test_success_is_the_share_that_is_given_the_target() -> None:
    task = SyntheticTask(clients=2, examples=400)
    bad = task.poisoned(Poison(trigger=("cf", "mn"), target=2))
    torch.manual_seed(0)  # PEFT draws the first A from the global generator
    model = attach(task.load_base(), task.lora_config())
    bad.train(model, 0, TrainPlan(steps=150, batch_size=64, learning_rate=0.01))
    _, truth = task._examples(0, "test")
    hits = total = 0
    held, _ = bad._examples(0, "test")
    with torch.inference_mode():
        for row in held:
            total += 1
            hits += int(model(row[None]).argmax()) == 2
    assert total == int((truth != 2).sum())
    success = bad.evaluate(model, 0, "test")["accuracy"]
    assert success == pytest.approx(hits / total)
    assert success > 0.8
    assert task.evaluate(model, 0, "test")["accuracy"] > 0.4


def test_neurotoxin_leaves_what_the_last_round_moved_most() -> None:
    moved_D = torch.tensor([0.1, -5.0, 0.2, 3.0, 0.0])
    assert quiet_entries(moved_D, 0.4).tolist() == [True, False, True, False, True]
    params = json.dumps({"clients": 2, "data_seed": 5})
    session = open_session("anabranch.simulation.synthetic:SyntheticTask", params)
    before = {name: t.clone() for name, t in session.template.tensors().items()}
    session.load(session.template)
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(t.shape, generator=generator) < 0.6 for name, t in before.items()}
    with confined(session.model, kept):
        session.task.train(session.model, 0, TrainPlan(steps=4, learning_rate=0.05))
    from anabranch.client.lora import read_adapter

    after = read_adapter(session.model).tensors()
    # Of a B that was zero, an A gets no gradient in the first step, but in those that follow.
    for name in before:
        assert torch.equal(after[name] != before[name], kept[name]), name


def manifest(scales: tuple[float | None, ...]) -> Manifest:
    meta = UpdateMeta("update", "0" * 64, "", "f", "r", 1, "c", b"", None, 1)
    rows = tuple(
        TensorInfo(str(index), (4,), None if scale is None else 2, scale)
        for index, scale in enumerate(scales)
    )
    return Manifest(meta, "ternary", (FrameInfo(1, rows, 8, 8, bytes(16)),))


def test_scale_inflation_multiplies_every_scale_and_nothing_else() -> None:
    honest = manifest((0.5, 0.0))
    found = inflated(honest, 10)
    assert [row.scale for row in found.frames[0].tensors] == [5.0, 0.0]
    assert inflated(found, 0.1) == honest
    with pytest.raises(ValueError, match="has no scale to inflate"):
        inflated(manifest((None,)), 10)

"""``recipe = "robust"`` in a federation: what it costs where nobody attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.simulation.baselines import score
from anabranch.simulation.federation import run_federation
from anabranch.simulation.prepare import prepare
from anabranch.simulation.scenario import Scenario, load_scenario, write_scenario
from anabranch.vectors.peft_folder import read_adapter

TASK = {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 8, "examples": 1000}


def scenario(recipe: Any, **changes: Any) -> Scenario:
    given = {
        "name": "calm",
        "seed": 1,
        "rounds": 4,
        "evaluate_every": 0,
        "task": TASK,
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
        "recipe": recipe,
        **changes,
    }
    return Scenario.model_validate(given)


def accuracy(recipe: Any, folder: Path) -> float:
    """On 500 validation examples of one teacher, which is every client's."""
    one = scenario(recipe)
    session = prepare(one)
    run_federation(one, folder, session)
    adapter = read_adapter(folder / ADAPTER_FOLDER)
    return score(session, adapter)["validation"]["group-0"]["accuracy"]


def test_it_costs_at_most_a_point_of_accuracy(tmp_path: Path) -> None:
    mean = accuracy({"method": "mean"}, tmp_path / "mean")
    robust = accuracy("robust", tmp_path / "robust")
    assert robust >= mean - 0.01
    # What is compared has learnt something.
    assert mean > accuracy({"method": "mean", "scale": 1e-6}, tmp_path / "base") + 0.05


def test_a_quorum_that_leaves_no_majority_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.robust: params.f: 4 malicious of 5"):
        prepare(scenario({"method": "robust", "params": {"f": 4}}))


def test_the_word_stands_in_a_scenario_file(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    write_scenario(scenario("robust"), path)
    again = load_scenario(path)
    assert again.recipe.method == "robust"
    path.write_text('name = "a"\nrecipe = "robust"\n')
    assert load_scenario(path).recipe == again.recipe

"""Differential privacy in a simulation: what it reports, where it stops, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.accountant import squared_mu_of
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario

TASK = {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 4, "group_count": 2}


PRIVACY = {"clip": 0.5, "epsilon": 8.0, "delta": 1e-3}


def scenario(**changes: Any) -> Scenario:
    given = {
        "name": "private", "rounds": 4, "task": TASK, "recipe": {"method": "fedit"},
        "train": {"steps": 5, "batch_size": 32, "learning_rate": 0.02},
        "baselines": {"local_only": False, "fedavg": False, "oracle": False},
        "privacy": PRIVACY, **changes,
    }  # fmt: skip
    return Scenario.model_validate(given)


def test_a_federation_reports_its_epsilon_and_stops_at_the_budget(tmp_path: Path) -> None:
    summary = simulate(scenario(), tmp_path / "planned")
    spent = [row["privacy"]["epsilon"] for row in summary["rounds"]]
    assert spent == sorted(spent)
    assert 7.9 < spent[-1] <= 8.0
    assert summary["privacy"]["stopped"] is None
    assert [row["privacy"]["rounds_left"] for row in summary["rounds"]] == [3, 2, 1, 0]
    assert summary["privacy"] == {
        "clip": 0.5, "noise_multiplier": summary["rounds"][-1]["privacy"]["noise_multiplier"],
        "divisor": 4, "sampling": "none", "adjacency": "zero-out", "seeded": False,
        "epsilon": spent[-1], "delta": 1e-3, "rounds_left": 0, "budget": 8.0, "stopped": None,
    }  # fmt: skip
    page = (tmp_path / "planned" / "report.html").read_text()
    assert "Epsilon 8 of 8 is spent at a\ndelta of 0.001; rounds left: 0." in page
    assert "divided by 4" in page
    assert [f"<td>{value:.3g}</td>" in page for value in spent] == [True] * 4
    # Chosen noise that spends the budget in two rounds: the other two are not begun.
    multiplier = (2 / squared_mu_of(8.0, 1e-3)) ** 0.5
    privacy = {"clip": 0.5, "epsilon": 8.0, "delta": 1e-3, "noise_multiplier": multiplier}
    summary = simulate(scenario(privacy=privacy), tmp_path / "early", report=False)
    assert [row["status"] for row in summary["rounds"]] == ["published", "published"]
    assert "one more would go beyond" in summary["privacy"]["stopped"]
    (row,) = FolderStore(tmp_path / "early").notes("stopped")
    assert row["round"] == 3


def test_two_runs_differ_but_for_a_seeded_noise_that_promises_nothing(tmp_path: Path) -> None:
    free = [simulate(scenario(rounds=1), tmp_path / name, report=False) for name in "ab"]
    assert free[0]["adapter_hash"] != free[1]["adapter_hash"]
    seeded = {**PRIVACY, "noise_seed": 3}
    runs = [simulate(scenario(privacy=seeded, rounds=1), tmp_path / name) for name in "cd"]
    assert runs[0]["adapter_hash"] == runs[1]["adapter_hash"]
    assert runs[0]["privacy"]["epsilon"] is None
    assert runs[0]["privacy"]["seeded"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "nothing is promised, and no epsilon" in page
    assert "is spent" not in page


@pytest.mark.parametrize("trains", ["b", "alternate"])
def test_one_factor_is_averaged_privately_as_it_is(trains: str, tmp_path: Path) -> None:
    summary = simulate(
        scenario(trains=trains, rounds=2, recipe={"method": "mean"}), tmp_path, report=False
    )
    assert [row["status"] for row in summary["rounds"]] == ["published"] * 2


def test_a_quorum_that_the_divisor_cannot_reach_is_found_before_anything_is_written(
    tmp_path: Path,
) -> None:
    alone = {**TASK, "clients": 1, "group_count": 1}
    with pytest.raises(ValueError, match=r"^privacy: .*; set clients, which is 1, to how many"):
        simulate(scenario(task=alone), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": {"method": "ties"}}, '"ties" has no known sensitivity; set it to "fedit"'),
        ({"recipe": {"method": "mean"}}, 'set it to "fedit", which averages what travels'),
        ({"recipe": {"method": "fedit"}, "trains": "b"}, 'set it to "mean", of the factor'),
        ({"recipe": {"method": "fedit", "scale": 2.0}}, "the mean must be plain"),
        (
            {"recipe": {"method": "fedit", "pre": [{"name": "clip"}]}},
            "the mean must be plain; leave params, pre",
        ),
        ({"ranks": {"client-0000": 2}}, "leave ranks out"),
        ({"codec": {"name": "dense", "feedback": 0}, "rest": "fedex"}, "published without noise"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_in_one_line(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        scenario(**changes)
    given = {
        "name": "f", "run": "r", "recipe": {"method": "fedit"}, "clients": 4, "privacy": PRIVACY,
        **changes,
    }  # fmt: skip
    with pytest.raises(ValidationError, match=reason):
        FederationConfig.model_validate(given)

"""Differential privacy: the account, the mechanism, and a federation that stops at its budget."""

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.accountant import (
    epsilon_spent,
    noise_multiplier,
    rounds_left,
)
from anabranch.coordinator.privacy.config import PrivacyConfig
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario

BUDGET = PrivacyConfig(clip=0.5, epsilon=8.0, delta=1e-5)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle and Wang (1805.06530), theorem 8: delta of noise of sigma on a sensitivity of 1."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2  # exact far out in the tail

    a, b = 1 / (2 * sigma), epsilon * sigma
    return phi(a - b) - math.exp(epsilon) * phi(-a - b)


@pytest.mark.parametrize("multiplier", [0.8, 1.7, 5.0])
@pytest.mark.parametrize("rounds", [1, 8, 100])
def test_the_account_is_the_gaussian_mechanisms_own(multiplier: float, rounds: int) -> None:
    epsilon = epsilon_spent(multiplier, rounds, 1e-5)
    assert gaussian_delta(multiplier / math.sqrt(rounds), epsilon) == pytest.approx(1e-5, rel=1e-3)


def test_the_account_agrees_with_a_numeric_composition() -> None:
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(1.7), 8)
    assert epsilon_spent(1.7, 8, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert epsilon_spent(1.7, 0, 1e-5) == 0.0


def test_the_least_noise_lasts_for_the_planned_rounds_and_no_longer() -> None:
    multiplier = noise_multiplier(BUDGET, 8)
    assert 7.99 < epsilon_spent(multiplier, 8, 1e-5) <= 8.0
    assert rounds_left(BUDGET, multiplier, 7)
    assert not rounds_left(BUDGET, multiplier, 8)


TASK = {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 4, "group_count": 2}


def scenario(**changes: Any) -> Scenario:
    given = {
        "name": "private", "rounds": 4, "task": TASK, "recipe": {"method": "fedit"},
        "train": {"steps": 5, "batch_size": 32, "learning_rate": 0.02},
        "baselines": {"local_only": False, "fedavg": False, "oracle": False},
        "privacy": {"clip": 0.5, "epsilon": 8.0, "delta": 1e-3}, **changes,
    }  # fmt: skip
    return Scenario.model_validate(given)


def test_a_federation_reports_its_epsilon_and_stops_at_the_budget(tmp_path: Path) -> None:
    summary = simulate(scenario(), tmp_path / "planned")
    spent = [row["epsilon"] for row in summary["rounds"]]
    assert spent == sorted(spent)
    assert 7.9 < spent[-1] <= 8.0
    assert summary["privacy"]["stopped"] is None
    # Chosen noise that spends the budget in two rounds: the other two are not begun.
    multiplier = noise_multiplier(PrivacyConfig(clip=0.5, epsilon=8.0, delta=1e-3), 2)
    privacy = {"clip": 0.5, "epsilon": 8.0, "delta": 1e-3, "noise_multiplier": multiplier}
    summary = simulate(scenario(privacy=privacy), tmp_path / "early")
    assert [row["status"] for row in summary["rounds"]] == ["published", "published"]
    assert "one more would go beyond" in summary["privacy"]["stopped"]
    (row,) = FolderStore(tmp_path / "early").notes("stopped")
    assert row["round"] == 3


def test_two_runs_differ_but_for_a_seeded_noise_that_promises_nothing(tmp_path: Path) -> None:
    free = [simulate(scenario(), tmp_path / name)["adapter_hash"] for name in "ab"]
    assert free[0] != free[1]
    seeded = {"clip": 0.5, "epsilon": 8.0, "delta": 1e-3, "noise_seed": 3}
    runs = [simulate(scenario(privacy=seeded), tmp_path / name) for name in "cd"]
    assert runs[0]["adapter_hash"] == runs[1]["adapter_hash"]
    assert runs[0]["privacy"]["epsilon"] is None
    assert runs[0]["privacy"]["seeded"]


@pytest.mark.parametrize("trains", ["b", "alternate"])
def test_one_factor_is_averaged_privately_as_it_is(trains: str, tmp_path: Path) -> None:
    summary = simulate(scenario(trains=trains, recipe={"method": "mean"}), tmp_path)
    assert [row["status"] for row in summary["rounds"]] == ["published"] * 4


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
    given = {"name": "f", "run": "r", "recipe": {"method": "fedit"}, "privacy": BUDGET, **changes}
    with pytest.raises(ValidationError, match=reason):
        FederationConfig.model_validate(given)

"""Differential privacy: the account, the mechanism, and a federation that stops at its budget."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.privacy.accountant import (
    epsilon_spent,
    noise_multiplier,
    rounds_left,
)
from anabranch.coordinator.privacy.config import PrivacyConfig
from anabranch.coordinator.privacy.mechanism import clip_factor, noise_source, private_mean
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


def test_no_update_counts_for_more_than_the_clip() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1.0, 1e6):
        change = {n: size * torch.randn(40, 3, generator=generator) for n in "ab"}
        factor = clip_factor(change, 0.5)
        norm = math.sqrt(sum(float((factor * t).double().square().sum()) for t in change.values()))
        assert norm <= 0.5
        assert factor == 1.0 or norm == pytest.approx(0.5, rel=1e-5)


def test_the_mean_is_of_clipped_changes_over_a_fixed_number_plus_noise() -> None:
    changes = [{"a": torch.full((2, 2), 10.0)}, {"a": torch.full((2, 2), 0.01)}]
    tiny = private_mean(changes, 0.5, 1e-9, 4, noise_source(1))["a"]
    assert torch.allclose(tiny, torch.full((2, 2), (0.25 + 0.01) / 4), rtol=1e-5)
    nothing = {"a": torch.zeros(200_000), "b": torch.zeros(())}
    noisy = private_mean([nothing], 0.5, 3.0, 4, noise_source(2))
    assert noisy["b"].shape == ()
    spread = float(noisy["a"].std())
    # The standard error of a standard deviation of 200,000 draws is 0.16%.
    assert spread == pytest.approx(0.5 * 3.0 / 4, rel=0.01)
    assert abs(float(noisy["a"].mean())) < 5 * spread / math.sqrt(200_000)
    sizes = np.abs(noisy["a"].numpy()) / spread
    assert (sizes > 1.96).mean() == pytest.approx(0.05, abs=0.003)


def test_noise_is_the_systems_unless_a_seed_is_given() -> None:
    change = [{"a": torch.zeros(8)}]
    draw = [private_mean(change, 1.0, 1.0, 1, noise_source(seed))["a"] for seed in (None, None)]
    assert not torch.equal(*draw)
    draw = [private_mean(change, 1.0, 1.0, 1, noise_source(seed))["a"] for seed in (7, 7)]
    assert torch.equal(*draw)


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

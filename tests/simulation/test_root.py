"""FLTrust in a whole federation: a client of the coordinator's own is the root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anabranch.coordinator.store import FolderStore
from anabranch.simulation import report
from anabranch.simulation.prepare import prepare
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario

NOTHING = dict.fromkeys(("local_only", "fedavg", "oracle", "unattacked", "undefended"), False)
FLTRUST = {"method": "fltrust", "params": {"root": "client-0000"}}


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_report", lambda summary, measured, path: None)


def scenario(**changes: Any) -> Scenario:
    given = {
        "name": "rooted",
        "seed": 3,
        "rounds": 2,
        "signed": True,
        "task": {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 6},
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
        "codec": {"name": "dense", "feedback": 0.0},
        "recipe": FLTRUST,
        "evaluate_every": 0,
        "attackers": [{"kind": "sign_flip", "count": 3, "params": {"scale": 1.0}}],
        "baselines": NOTHING,
        **changes,
    }
    return Scenario.model_validate(given)


def test_whoever_points_against_the_root_counts_nothing(tmp_path: Path) -> None:
    """Half of the clients attack, which no majority could outvote."""
    simulate(scenario(), tmp_path)
    for row in FolderStore(tmp_path).publications():
        weights = dict(zip(row.report["names"], row.report["coefficients"], strict=True))
        assert weights["client-0000"] == 0.0  # it measures, and is not merged
        assert min(weights["client-0001"], weights["client-0002"]) > 0.1
        assert [weights[f"client-000{number}"] for number in (3, 4, 5)] == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"signed": False}, "call themselves what they like; set signed = true"),
        ({"fraction": 0.5}, "needs its root 'client-0000' in every round"),
        ({"recipe": {**FLTRUST, "suspicion": {}}}, "name it in suspicion.allow"),
        ({"recipe": {"method": "fltrust"}}, "no client 'root' to train the coordinator's root"),
        ({"recipe": {"method": "fltrust", "params": {"root": "client-0005"}}}, "attacks"),
    ],
)
def test_a_root_that_cannot_be_trusted_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        prepare(scenario(**changes))

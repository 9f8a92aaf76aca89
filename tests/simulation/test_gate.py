"""The gate in whole federations on the synthetic task, with clients that attack."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anabranch.client.session import open_session
from anabranch.coordinator.gate import Scorecard
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.validation import ValidationScorer, validation_scorer, write_task
from anabranch.vectors import Adapter

TASK = {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 6}
NOTHING = dict.fromkeys(("local_only", "fedavg", "oracle", "unattacked", "undefended"), False)

run_quickly = partial(simulate, report=False)
"""Drawing takes three times as long as such a federation."""


def scenario(**changes: Any) -> Scenario:
    given = {
        "name": "gated",
        "seed": 3,
        "rounds": 3,
        "task": TASK,
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
        "codec": {"name": "dense", "feedback": 0.0},
        "recipe": {"method": "mean"},
        "quorum": 4,
        "evaluate_every": 0,
        "baselines": NOTHING,
        **changes,
    }
    return Scenario.model_validate(given)


def test_what_is_no_worse_passes_and_scoring_changes_nothing(tmp_path: Path) -> None:
    gated = run_quickly(
        scenario(gate={"metric_drop": 0.2, "negative_flips": 0.5}), tmp_path / "gated"
    )
    plain = run_quickly(scenario(), tmp_path / "plain")
    assert [row["status"] for row in gated["rounds"]] == ["published"] * 3
    assert gated["adapter_hash"] == plain["adapter_hash"]
    first = gated["rounds"][0]["gate"]
    assert first["passed"]
    assert first["metric"] > first["metric_before"]
    assert first["positive_flips"] > first["negative_flips"]


def test_an_attacked_merge_is_kept_back_and_the_page_says_why(tmp_path: Path) -> None:
    """From round 2 on one in six sends its update a hundred times as large, and turned round."""
    band = {"kind": "sign_flip", "count": 1, "from_round": 2, "params": {"scale": 100.0}}
    gated = simulate(scenario(attackers=[band], gate={}), tmp_path / "gated")
    page = (tmp_path / "gated" / "report.html").read_text()
    open_ = run_quickly(scenario(attackers=[band]), tmp_path / "open")
    statuses = [row["status"] for row in gated["rounds"]]
    assert statuses == ["published", "abandoned", "abandoned"]
    second = gated["rounds"][1]
    assert second["reason"].startswith("the gate kept the adapter in service: ")
    assert "128 inputs turn from right to wrong" in second["reason"]
    assert not second["gate"]["passed"]
    assert second["gate"]["negative_flips"] > 0.05
    assert gated["mean"]["merged"] > open_["mean"]["merged"] + 0.05
    assert "kept back\n2." in page
    assert "128 inputs turn from right to wrong" in page
    for row in gated["rounds"]:
        said = "passed" if row["gate"]["passed"] else "kept back"
        assert f'<td>{row["round"]}</td><td class="left">{said}</td>' in page
    # What a gate leaves in the folder does not keep it from being run again.
    again = simulate(scenario(rounds=1, gate={}), tmp_path / "gated", overwrite=True)
    assert len(again["rounds"]) == 1


def test_who_stood_out_in_a_merge_that_was_kept_back_is_told(tmp_path: Path) -> None:
    """The gate keeps the attacked round back; suspicion had found the attacker all the same."""
    band = {"kind": "gaussian", "count": 1, "from_round": 2}
    summary = simulate(
        scenario(
            rounds=2,
            attackers=[band],
            gate={},
            recipe={"method": "mean", "suspicion": {"action": "note"}},
        ),
        tmp_path,
    )
    last = summary["rounds"][-1]
    assert last["status"] == "abandoned"
    assert last["suspicion"]["scores"]["client-0005"] > 6
    assert {(row["round"], row["client"]) for row in summary["suspicions"]} == {(2, "client-0005")}
    (told,) = [row for row in summary["defence"]["clients"] if row["attacks"]]
    assert told["done"] == {"note": 1}
    assert told["signals"]["energy"]["round"] == 2


class Failing:
    """A scorer whose data is gone."""

    def score(self, adapter: Adapter) -> Scorecard:
        raise ValueError("the validation data is gone")


def failing(folder: Path) -> Failing:
    return Failing()


def test_a_scorer_that_fails_lets_nothing_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.simulation.validation.validation_scorer", failing)
    why = "nothing was merged: the gate could not judge it: the validation data is gone"
    with pytest.raises(RuntimeError, match=why):
        run_quickly(scenario(rounds=1, gate={}), tmp_path / "out")


def test_the_scorer_tells_what_the_task_does(tmp_path: Path) -> None:
    write_task(TASK["kind"], json.dumps({"clients": 6, "group_count": 2}), tmp_path)
    scorer = validation_scorer(tmp_path)
    session = open_session(TASK["kind"], json.dumps({"clients": 6, "group_count": 2}))
    card = scorer.score(session.template)
    assert isinstance(scorer, ValidationScorer)
    assert card.right is not None
    assert len(card.right) == 2 * 128
    assert card.metric == pytest.approx(sum(card.right) / len(card.right))
    with pytest.raises(ValueError, match="names no task to score by"):
        validation_scorer(tmp_path / "nowhere")


def test_no_gate_beside_privacy() -> None:
    privacy = {"clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
    with pytest.raises(ValidationError, match="only what is published is in the account"):
        scenario(recipe={"method": "fedit"}, privacy=privacy, gate={}, quorum=6)

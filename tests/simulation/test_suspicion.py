"""Suspicion in a whole federation: attackers are left out, and journal, receipt and page say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from anabranch.coordinator.federation import load_federation
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.verification import Verifier
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.receipt import decode_receipt


def scenario(**changes: Any) -> Scenario:
    nothing = {"local_only": False, "fedavg": False, "oracle": False, "unattacked": False}
    nothing["undefended"] = False
    given = {
        "name": "suspected",
        "seed": 3,
        "rounds": 2,
        "task": {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 8},
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
        "codec": {"name": "dense", "feedback": 0.0},
        "recipe": {"method": "mean", "suspicion": {"action": "exclude"}},
        "evaluate_every": 0,
        "attackers": [{"kind": "gaussian", "count": 2}],
        "baselines": nothing,
        **changes,
    }
    return Scenario.model_validate(given)


def test_attackers_are_left_out_and_everybody_is_told(tmp_path: Path) -> None:
    wanted = {**scenario().baselines.model_dump(), "undefended": True}
    summary = simulate(scenario(baselines=wanted), tmp_path / "out")
    attackers = {row["id"] for row in summary["clients"] if row["attacks"]}
    assert len(attackers) == 2
    for number in (1, 2):
        found = {row["client"] for row in summary["suspicions"] if row["round"] == number}
        assert found == attackers
    assert {row["action"] for row in summary["suspicions"]} == {"exclude"}
    assert summary["mean"]["merged"] > summary["mean"]["base"]
    page = (tmp_path / "out" / "report.html").read_text()
    open_ = simulate(scenario(recipe={"method": "mean"}), tmp_path / "open", report=False)
    assert summary["mean"]["merged"] > open_["mean"]["merged"] + 0.05
    # What the same attack does where nothing defends, told without a second run by hand.
    assert summary["mean"]["undefended"] == open_["mean"]["merged"]
    assert open_["mean"]["undefended"] is None

    folder = tmp_path / "out"
    store = FolderStore(folder)
    receipt = decode_receipt(store.receipts()[-1], None)
    assert {(one.client, one.code) for one in receipt.exclusions} == {
        (client, "suspicion") for client in attackers
    }
    assert all("times the cohort's median" in one.reason for one in receipt.exclusions)
    assert {one.client for one in receipt.inputs if one.weight == 0.0} == attackers
    assert "merged from the updates of 6 clients; 2 others were left out" in (
        folder / "adapter" / "README.md"
    ).read_text().replace("\n", " ")
    config, template = load_federation(folder), read_adapter(folder / "start")
    verifier = Verifier(store, config, template)
    for data in store.receipts():
        again = {check.what: check.status for check in verifier.verify(data).checks}
        assert again["merge"] == "ok", again

    assert "Contributions that stood out" in page
    assert page.count('<td class="left"><code>exclude</code></td>') == len(summary["suspicions"])
    assert f"{100 * summary['mean']['undefended']:.1f}" in page
    told = summary["defence"]
    assert told["policy"]["actions"] == dict.fromkeys(
        ("spectrum", "energy", "factors", "cosine"), "exclude"
    )
    for row in told["clients"]:
        attacks = row["id"] in attackers
        assert (row["attacks"] is not None) == attacks
        assert row["done"] == ({"exclude": 2} if attacks else {})
        assert (row["score"] >= 6) == attacks
        # Six share what eight would have.
        assert row["weight"] == pytest.approx(0.0 if attacks else 8 / 6)
    loudest = max(told["clients"], key=lambda row: row["score"])["signals"]["energy"]
    assert str(escape(loudest["why"])) in page
    assert loudest["score"] == max(row["score"] for row in summary["suspicions"])


def test_the_page_tells_what_each_signal_did_and_where(tmp_path: Path) -> None:
    """Another action for another signal: one module is merged without one, another is left out."""
    run = scenario(
        rounds=1,
        recipe={
            "method": "mean",
            "suspicion": {"action": "mask_module", "actions": {"cosine": "exclude"}},
        },
        attackers=[
            {"kind": "gaussian", "count": 1},
            {"kind": "sign_flip", "count": 1, "params": {"scale": 1.0}},
        ],
    )
    summary = simulate(run, tmp_path)
    by_kind = {row["attacks"]: row for row in summary["defence"]["clients"]}
    assert by_kind["gaussian"]["masked"] == {"hidden": 1}
    assert by_kind["sign_flip"]["done"] == {"exclude": 1}
    assert by_kind["sign_flip"]["signals"]["cosine"]["round"] == 1
    page = (tmp_path / "report.html").read_text()
    assert "cosine <code>exclude</code>." in page
    assert "it points against the others" in page
    assert "<code>hidden</code> 1" in page

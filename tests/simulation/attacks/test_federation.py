"""Attackers in whole federations on the synthetic task: they sign and send, and what they gain."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from anabranch.coordinator.store import FolderStore
from anabranch.simulation.attacks.ipm import IPM, IpmConfig
from anabranch.simulation.attacks.lying_manifest import Lie
from anabranch.simulation.attacks.turn import flat
from anabranch.simulation.prepare import prepare
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario
from anabranch.wire import decode_update, read_manifest

TASK = {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 8}
NOTHING = dict.fromkeys(("local_only", "fedavg", "oracle", "unattacked", "undefended"), False)

run_quickly = partial(simulate, report=False)
"""Drawing takes three times as long as such a federation."""


def scenario(kind: str, count: int = 2, **changes: Any) -> Scenario:
    params = changes.pop("params", {})
    band = {"kind": kind or "alie", "count": count, "params": params, **changes.pop("band", {})}
    given = {
        "name": "attacked",
        "seed": 3,
        "rounds": 3,
        "task": TASK,
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
        "codec": {"name": "dense", "feedback": 0.0},
        "recipe": {"method": "mean"},
        "quorum": 4,
        "evaluate_every": 0,
        "baselines": NOTHING,
        "attackers": [band],
        **changes,
    }
    return Scenario.model_validate(given)


def updates(folder: Path, round_number: int) -> dict[str, torch.Tensor]:
    """What each client sent, flat."""
    store = FolderStore(folder)
    found = {}
    for row in store.contributions(round_number):
        blob = store.get(row.digest)
        manifest = read_manifest(blob)
        layout = {row.name: row.shape for frame in manifest.frames for row in frame.tensors}
        found[row.client] = flat(decode_update(blob, layout)[1])
    return found


def test_a_mean_loses_accuracy_to_a_sign_flip_and_a_median_keeps_it(tmp_path: Path) -> None:
    params = {"scale": 10}
    baselines = {**NOTHING, "unattacked": True}
    found = {
        method: run_quickly(
            scenario("sign_flip", recipe={"method": method}, params=params, baselines=baselines),
            tmp_path / method,
        )["mean"]
        for method in ("mean", "median")
    }
    assert found["mean"]["unattacked"] > found["mean"]["base"]
    assert found["mean"]["merged"] < found["mean"]["unattacked"] - 0.2
    assert found["median"]["merged"] > found["median"]["unattacked"] - 0.05


def test_attackers_send_what_is_crafted_from_what_the_honest_clients_send(tmp_path: Path) -> None:
    """Bit for bit: they train as the honest ones do, and sign with their own keys."""
    run = scenario("ipm", params={"epsilon": 2.0}, signed=True, rounds=2)
    summary = run_quickly(run, tmp_path)
    assert not summary["refused"]
    assert summary["attack"]["bands"][0]["ids"] == ["client-0006", "client-0007"]
    for round_number in (1, 2):
        sent = updates(tmp_path, round_number)
        honest_HD = torch.stack([sent[f"client-{number:04d}"] for number in range(6)])
        crafted = IPM(honest_HD, 2, IpmConfig(epsilon=2.0))
        assert torch.equal(sent["client-0006"], crafted[0])
        assert torch.equal(sent["client-0007"], crafted[1])
    store = FolderStore(tmp_path)
    keys = {read_manifest(store.get(row.digest)).key_id for row in store.contributions(1)}
    assert len(keys) == 8
    assert b"" not in keys


def test_they_behave_until_their_round_and_may_see_only_themselves(tmp_path: Path) -> None:
    band = {"from_round": 2, "sees": "own"}
    run_quickly(scenario("ipm", params={"epsilon": 2.0}, rounds=2, band=band), tmp_path / "a")
    run_quickly(scenario("ipm", rounds=2, attackers=[]), tmp_path / "b")
    attacked, quiet = updates(tmp_path / "a", 1), updates(tmp_path / "b", 1)
    assert all(torch.equal(attacked[name], quiet[name]) for name in quiet)
    attacked, quiet = updates(tmp_path / "a", 2), updates(tmp_path / "b", 2)
    own_fD = torch.stack([quiet["client-0006"], quiet["client-0007"]])
    torch.testing.assert_close(attacked["client-0006"], -2 * own_fD.mean(dim=0))
    assert torch.equal(attacked["client-0005"], quiet["client-0005"])


def test_a_free_rider_repeats_the_last_change(tmp_path: Path) -> None:
    run_quickly(scenario("free_rider", params={"noise": 0.0}), tmp_path)
    assert not updates(tmp_path, 1)["client-0007"].any()
    sent = updates(tmp_path, 2)
    first = torch.stack(list(updates(tmp_path, 1).values()))
    # The mean of ΔW is cut back to rank r and turned: long as the change of the factors, not equal.
    assert bool(sent["client-0007"].any())
    assert torch.equal(sent["client-0007"], sent["client-0006"])
    assert float(sent["client-0007"].norm()) < 2 * float(first.norm(dim=1).max())


@pytest.mark.parametrize("trains", ["both", "b"])
def test_an_adaptive_attack_asks_the_recipe_that_is_used(tmp_path: Path, trains: str) -> None:
    search = {"points": 4, "refinements": 1}
    run = scenario("adaptive", params=search, trains=trains, rounds=1)
    summary = run_quickly(run, tmp_path)
    assert summary["mean"]["merged"] < summary["mean"]["base"] - 0.1


def test_it_asks_one_that_would_not_merge_the_honest_alone(tmp_path: Path) -> None:
    search = {"points": 4, "refinements": 1}
    recipe = {"method": "multi_krum", "params": {"f": 2}}
    summary = run_quickly(scenario("adaptive", params=search, recipe=recipe, quorum=8), tmp_path)
    assert not summary["refused"]
    assert summary["mean"]["merged"] > summary["mean"]["base"]


@pytest.mark.parametrize("kind", ["model_replacement", "dba", "neurotoxin", "lobam"])
def test_a_backdoor_opens_in_a_mean(tmp_path: Path, kind: str) -> None:
    params = {"factor": 4.0} if kind == "lobam" else {"scale": 4.0}
    summary = run_quickly(scenario(kind, params=params, signed=True, quorum=8), tmp_path)
    (band,) = summary["attack"]["bands"]
    assert band["admitted"] == 6
    assert band["weight"] == pytest.approx(0.25)
    assert band["success"]["merged"] > band["success"]["base"] + 0.4


def test_a_page_tells_of_a_backdoor_and_of_what_would_have_been(tmp_path: Path) -> None:
    wanted = {**NOTHING, "unattacked": True, "fedavg": True}
    given: dict[str, Any] = {"params": {"scale": 4.0}, "baselines": wanted}
    summary = simulate(scenario("backdoor", **given), tmp_path)
    success = summary["attack"]["bands"][0]["success"]
    assert success["unattacked"] < 0.4 < min(success["merged"], success["fedavg"])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    page = (tmp_path / "report.html").read_text()
    for text in ("success of backdoor", "(backdoor)", f"{100 * success['merged']:.1f}"):
        assert text in page


def test_multi_krum_leaves_the_flipped_out_and_the_summary_says_so(tmp_path: Path) -> None:
    recipe = {"method": "multi_krum", "params": {"f": 2}}
    summary = run_quickly(
        scenario("sign_flip", params={"scale": 10}, recipe=recipe, quorum=7), tmp_path
    )
    assert summary["attack"]["bands"][0]["weight"] == 0
    assert [row["attacks"] for row in summary["clients"]][-3:] == [None, "sign_flip", "sign_flip"]


TERNARY = {"name": "ternary", "density": 0.3}


LIES = {
    "round": "stale-round",
    "base": "wrong-base-hash",
    "start": "wrong-start-hash",
    "run": "wrong-run",
    "client": "wrong-client",
    "codec": "wrong-codec",
    "shape": "layout",
    "nonzeros": "counts",
    "digest": "digest",
    "raw_bytes": "counts",
    "scale": "values",
}


def test_what_lies_about_itself_is_refused_however_well_signed(tmp_path: Path) -> None:
    """Every lie there is, one client each, beside four honest ones."""
    assert {*LIES, "examples"} == set(get_args(Lie))
    bands = [{"kind": "lying_manifest", "count": 1, "params": {"about": lie}} for lie in LIES]
    bands += [
        {"kind": "support_stuffing", "count": 1, "params": {"density": density}}
        for density in (0.31, 1.0)
    ]
    task = {**TASK, "clients": len(bands) + 4}
    run = scenario("", attackers=bands, task=task, codec=TERNARY, signed=True, rounds=1)
    summary = run_quickly(run, tmp_path)
    found = [band["reasons"] for band in summary["attack"]["bands"]]
    assert found == [{code: 1} for code in (*LIES.values(), "over-density", "over-density")]
    assert [row["status"] for row in summary["rounds"]] == ["published"]
    assert summary["rounds"][0]["admitted"] == 4


def test_a_claim_of_many_examples_is_admitted_and_moves_nothing(tmp_path: Path) -> None:
    honest = run_quickly(scenario("ipm", attackers=[], codec=TERNARY, rounds=1), tmp_path / "a")
    params = {"about": "examples"}
    lying = run_quickly(
        scenario("lying_manifest", params=params, codec=TERNARY, rounds=1), tmp_path / "b"
    )
    assert lying["attack"]["bands"][0]["admitted"] == 2
    assert lying["adapter_hash"] == honest["adapter_hash"]


def test_an_inflated_scale_is_refused_by_a_cap_bounded_by_a_median_and_rules_a_mean(
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"codec": TERNARY, "params": {"factor": 1e6}, "signed": True}
    capped = run_quickly(scenario("scale_inflation", max_norm=10.0, **given), tmp_path / "capped")
    assert capped["attack"]["bands"][0]["reasons"] == {"norm": 6}
    honest = run_quickly(scenario("ipm", attackers=[], codec=TERNARY), tmp_path / "honest")
    median = run_quickly(
        scenario("scale_inflation", recipe={"method": "median"}, **given), tmp_path / "median"
    )
    mean = run_quickly(scenario("scale_inflation", **given), tmp_path / "mean")
    for name, summary in (("median", median), ("mean", mean)):
        assert summary["attack"]["bands"][0]["admitted"] == 6, name
    accuracy = honest["mean"]["merged"]
    assert capped["mean"]["merged"] > accuracy - 0.05
    assert median["mean"]["merged"] > accuracy - 0.1
    assert mean["mean"]["merged"] < accuracy - 0.1


def test_a_scenario_whose_attack_cannot_be_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match=r"attackers\.0\.kind: 'alien' is no kind of attacker"):
        prepare(scenario("alien"))
    with pytest.raises(ValueError, match=r"attackers\.0: target: there is no label 9"):
        prepare(scenario("backdoor", params={"target": 9}))
    given: dict[str, Any] = {"signed": True, "quorum": 8, "recipe": {"method": "fedit"}}
    secure = scenario("scale_inflation", secure={}, **given)
    with pytest.raises(ValueError, match=r"attackers\.0\.kind: scale_inflation rewrites an enc"):
        prepare(secure)
    sealed = scenario("scale_inflation", signed=True, sealed=True)
    with pytest.raises(ValueError, match=r"with sealed clients send sealed ones; leave sealed out"):
        prepare(sealed)
    with pytest.raises(ValueError, match=r"attackers\.0: 8 of the 8 clients left would attack"):
        prepare(scenario("alie", count=8))

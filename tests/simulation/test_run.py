"""Whole simulations on the synthetic task: results, determinism, resuming."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from peft import PeftModel
from torch import Tensor

from anabranch.aggregation import merge, merge_one_factor
from anabranch.aggregation.engine import groups as engine_groups
from anabranch.aggregation.methods.tsv_m import TSV_M
from anabranch.client.lora import read_adapter
from anabranch.client.session import open_session
from anabranch.coordinator.flower import FlowerError
from anabranch.coordinator.published import check_folder
from anabranch.coordinator.store import FolderStore
from anabranch.simulation import synthetic
from anabranch.simulation.baselines import fedavg_of
from anabranch.simulation.prepare import prepare
from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario, write_scenario
from anabranch.simulation.synthetic import SyntheticTask
from anabranch.vectors import peft_folder
from anabranch.vectors.fisher_file import read_fisher, write_fisher
from anabranch.vectors.importance import from_flat_importance, importance_layout
from anabranch.wire import decode_forms
from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.sealing import SEAL_BYTES
from anabranch.wire.signing import KeyRing

TASK = {"kind": "anabranch.simulation.synthetic:SyntheticTask", "clients": 4, "group_count": 2}

run_quickly = partial(simulate, report=False)
"""Drawing takes three times as long as such a federation."""


def scenario(**changes: Any) -> Scenario:
    given = {
        "name": "small",
        "seed": 3,
        "rounds": 4,
        "task": TASK,
        "train": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
        "recipe": {"method": "ties", "params": {"density": 0.4}},
        **changes,
    }
    return Scenario.model_validate(given)


def test_a_run_leaves_what_people_look_for(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    summary = simulate(
        scenario(), out, progress=lambda phase, done, total: steps.append((phase, done, total))
    )
    for name in ("metrics.jsonl", "config.toml", "summary.json", "report.html", "adapter"):
        assert (out / name).exists(), name
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["mean"]["merged"] > summary["mean"]["base"]
    assert summary["mean"]["oracle"] > summary["mean"]["base"]
    assert [row["client"] for row in summary["clients"]] == [
        "group-0-1", "group-1-1", "group-0-2", "group-1-2",
    ]  # fmt: skip
    for column in ("base", "local_only", "fedavg", "merged", "oracle"):
        mean = sum(row[column] for row in summary["clients"]) / 4
        assert summary["mean"][column] == pytest.approx(mean)
    rows = [row for row in summary["clients"] if row["group"] == "group-1"]
    for column in ("base", "local_only", "local_only_own", "fedavg", "merged", "oracle"):
        task_mean = sum(row[column] for row in rows) / 2
        assert summary["groups"]["group-1"][column] == pytest.approx(task_mean)
    size = summary["update_bytes"]
    assert size["payload"] < size["ours"] < size["fp16"] < size["fp32"]
    assert [row["status"] for row in summary["rounds"]] == ["published"] * 4
    # Each phase's bar ends full.
    last = {phase: (done, total) for phase, done, total in steps}
    assert {done == total for done, total in last.values()} == {True}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "task group-1" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "None: every update that was asked for was admitted." in page


def test_peft_loads_the_merged_adapter(tmp_path: Path) -> None:
    run_quickly(
        scenario(baselines={"local_only": False, "fedavg": False, "oracle": False}), tmp_path
    )
    session = open_session(TASK["kind"], json.dumps({"clients": 4, "group_count": 2}))
    model = PeftModel.from_pretrained(session.task.load_base(), str(tmp_path / "adapter"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    accuracy = session.task.evaluate(model, 0, "test")["accuracy"]
    assert accuracy == summary["groups"]["group-0"]["merged"]
    assert read_adapter(model).hash() == summary["adapter_hash"]


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(tmp_path: Path) -> None:
    only = {"baselines": {"local_only": False, "fedavg": False, "oracle": False}}
    hashes = [
        run_quickly(scenario(seed=seed, **only), tmp_path / name)["adapter_hash"]
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_one_factor_a_round_costs_about_half_the_bytes(tmp_path: Path) -> None:
    only = {"baselines": {"local_only": False, "fedavg": False, "oracle": False}}
    # As many entries in A as in B, and a random A that spans the inputs.
    task = {**TASK, "features": 16, "hidden": 16, "rank": 16}
    given = {**only, "task": task, "codec": {"name": "dense", "feedback": 0.0}}
    given["recipe"] = {"method": "mean"}
    runs = {
        trains: run_quickly(scenario(trains=trains, **given), tmp_path / trains)
        for trains in ("both", "b", "alternate")
    }
    both = runs["both"]["update_bytes"]["ours"]
    for trains in ("b", "alternate"):
        assert 0.45 < runs[trains]["update_bytes"]["ours"] / both < 0.6
        assert runs[trains]["mean"]["merged"] > runs[trains]["mean"]["base"] + 0.05
        again = run_quickly(scenario(trains=trains, **given), tmp_path / f"{trains}-again")
        assert again["adapter_hash"] == runs[trains]["adapter_hash"]
    down = {trains: run["rounds"][-1]["bytes_down"] for trains, run in runs.items()}
    assert 0.45 < down["b"] / down["both"] < 0.6
    assert down["alternate"] == pytest.approx(down["both"], rel=0.01)


@pytest.mark.parametrize("trains", ["both", "b"])
def test_a_federation_by_fisher_gives_what_the_library_gives_offline(
    tmp_path: Path, trains: Literal["both", "b"]
) -> None:
    fisher = scenario(
        rounds=1,
        down="fp32",
        trains=trains,
        recipe={"method": "fisher"},
        baselines={"local_only": False, "fedavg": False, "oracle": False},
    )
    run_folder = tmp_path / "run"
    summary = run_quickly(fisher, run_folder)
    start, store = peft_folder.read_adapter(run_folder / "start"), FolderStore(run_folder)
    before = start.tensors()
    layout = {name: tuple(tensor.shape) for name, tensor in start.tensors(trains).items()}
    ends = []
    for row in store.contributions(1):
        blob = store.get(row.digest)
        _, changes, weights = decode_forms(blob, layout, importance_layout(start, trains))
        moved = {name: before[name] + change.dense() for name, change in changes.items()}
        folder = tmp_path / row.client
        peft_folder.write_adapter(start.with_tensors({**before, **moved}), folder)
        write_fisher(from_flat_importance(weights), folder)
        end = peft_folder.read_adapter(folder)
        ends.append(replace(end, importance=read_fisher(folder)))
    assert len(ends) == 4

    def offline(method: str) -> str:
        recipe = fisher.recipe.model_copy(update={"method": method})
        if trains == "b":
            return merge_one_factor(ends, recipe, trains, start=start).adapter.hash()
        return merge(ends, recipe, start=start).adapter.hash()

    assert summary["adapter_hash"] == offline("fisher")
    assert summary["adapter_hash"] != offline("mean")
    assert peft_folder.read_adapter(run_folder / "adapter").hash() == offline("fisher")


def test_a_federation_merges_by_the_fishers_of_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher = scenario(
        recipe={"method": "fisher"},
        baselines={"local_only": False, "fedavg": False, "oracle": False},
    )
    hashes = [run_quickly(fisher, tmp_path / name)["adapter_hash"] for name in "ab"]
    assert hashes[0] == hashes[1]

    class Silent(SyntheticTask):
        logits = None  # type: ignore[assignment]

    monkeypatch.setattr(synthetic, "Silent", Silent, raising=False)
    silent = scenario(
        recipe={"method": "fisher"}, task={"kind": "anabranch.simulation.synthetic:Silent"}
    )
    with pytest.raises(ValueError, match=r"recipe: fisher needs the clients' Fisher, and task\."):
        run_quickly(silent, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("method", ["mean", "hetlora"])
def test_clients_of_several_ranks_learn_together(tmp_path: Path, method: str) -> None:
    given: dict[str, Any] = {
        "baselines": {"local_only": False, "fedavg": False, "oracle": False},
        "ranks": {"client-0000": 1, "client-0001": 2},
        "recipe": {"method": method},
        "codec": {"name": "dense", "feedback": 0.0},
        "rounds": 8,
    }
    first, second = (run_quickly(scenario(**given), tmp_path / name) for name in "ab")
    assert first["adapter_hash"] == second["adapter_hash"]
    assert first["mean"]["merged"] > first["mean"]["base"] + 0.05
    assert not first["refused"]


@pytest.mark.parametrize("rest", ["fedex", "flora"])
def test_peft_loads_an_adapter_with_all_that_was_kept(tmp_path: Path, rest: str) -> None:
    given: dict[str, Any] = {
        "baselines": {"local_only": False, "fedavg": False, "oracle": False},
        "recipe": {"method": "mean"},
        "codec": {"name": "dense", "feedback": 0.0},
        "rest": rest,
    }
    first, second = (run_quickly(scenario(**given), tmp_path / name) for name in "ab")
    assert first["adapter_hash"] == second["adapter_hash"]
    assert first["mean"]["merged"] > first["mean"]["base"] + 0.05
    session = open_session(TASK["kind"], json.dumps({"clients": 4, "group_count": 2}))
    model = PeftModel.from_pretrained(session.task.load_base(), str(tmp_path / "a" / "adapter"))
    assert read_adapter(model).lora["hidden"].rank > 4
    accuracy = session.task.evaluate(model, 0, "test")["accuracy"]
    assert accuracy == pytest.approx(first["groups"]["group-0"]["merged"], abs=0.01)
    # What a client ships is what it trains: its size beside a dense update of the same ranks.
    assert first["update_bytes"]["fp32"] == 4 * 4 * (32 + 64)
    down = [row["bytes_down"] for row in first["rounds"]]
    # More ranks from round to round, up to the most there can be; coding moves a few bytes.
    assert all(after > 0.99 * before for before, after in itertools.pairwise(down))
    assert down[-1] > 1.5 * down[0]


def test_both_engines_agree(tmp_path: Path) -> None:
    only = {"rounds": 2, "baselines": {"local_only": False, "fedavg": False, "oracle": False}}
    ours = run_quickly(scenario(**only), tmp_path / "ours")
    flower = run_quickly(scenario(engine="flower", signed=True, **only), tmp_path / "flower")
    assert flower["mean"]["merged"] == pytest.approx(ours["mean"]["merged"], abs=0.02)
    from anabranch.vectors.peft_folder import read_adapter as read

    a, b = (
        read(tmp_path / name / "adapter").lora["hidden"].delta().dense()
        for name in ("ours", "flower")
    )
    assert float((a - b).norm()) <= 1e-4 * float(a.norm())


def test_a_failed_flower_run_is_reported_with_its_log(tmp_path: Path) -> None:
    from anabranch.simulation.engine.flower import run_in_flower

    with pytest.raises(FlowerError, match=r"finished:failed.*see .*run\.log"):
        run_in_flower(tmp_path, 2, {"task": "", "task-params": ""}, timeout_s=120)


class StopHere(KeyboardInterrupt):
    """The test's own interruption."""


def stop_at(phase: str, done: int) -> Callable[[str, int, int], None]:
    def progress(at: str, count: int, total: int) -> None:
        if (at, count) == (phase, done):
            raise StopHere

    return progress


SIGNED = scenario(codec={"name": "dense", "feedback": 0.0}, signed=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run that nobody interrupted."""
    return run_quickly(SIGNED, tmp_path_factory.mktemp("run") / "whole")


@pytest.mark.parametrize("cut", [("federation", 14), ("oracle", 0), ("local-only", 2)])
def test_an_interrupted_run_goes_on(
    cut: tuple[str, int], whole: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(StopHere):
        run_quickly(SIGNED, tmp_path / "cut", progress=stop_at(*cut))
    with pytest.raises(ValueError, match="--resume"):
        run_quickly(SIGNED, tmp_path / "cut")
    resumed = run_quickly(SIGNED, tmp_path / "cut", resume=True)
    assert (whole["resumed"], resumed["resumed"]) == (False, True)
    assert resumed["adapter_hash"] == whole["adapter_hash"]
    assert resumed["mean"] == whole["mean"]
    ring = KeyRing(by_id([seeded_key("coordinator", SIGNED.seed).public]))
    assert check_folder(tmp_path / "cut" / "adapter", ring)["federation"] == SIGNED.name


ONLY = {"rounds": 1, "baselines": {"local_only": False, "fedavg": False, "oracle": False}}


def test_sealed_updates_are_sealed_and_merge_alike(tmp_path: Path) -> None:
    plain = simulate(scenario(signed=True, **ONLY), tmp_path / "plain")
    sealed = simulate(scenario(signed=True, sealed=True, **ONLY), tmp_path / "sealed")
    assert sealed["adapter_hash"] == plain["adapter_hash"]
    for name, more in (("plain", 0), ("sealed", SEAL_BYTES)):
        store = FolderStore(tmp_path / name)
        rows = store.contributions(1)
        assert rows
        assert all(row.size_bytes == len(store.get(row.digest)) + more for row in rows)


def test_a_folder_is_never_taken_over_silently(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    write_scenario(scenario(), tmp_path / "config.toml")
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"'diary\.txt', which no run wrote"):
            run_quickly(scenario(), tmp_path, **how)
    (tmp_path / "diary.txt").unlink()
    # Also somebody's scenario is no run.
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"'config\.toml', which no run wrote"):
            run_quickly(scenario(), tmp_path, **how)
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]


def test_overwriting_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_quickly(scenario(**ONLY), out)
    with pytest.raises(ValueError, match="another scenario"):
        run_quickly(scenario(**{**ONLY, "seed": 9}), out, resume=True)
    (out / "notes.txt").write_text("mine")
    (out / ".adapter.new.0123abcd").mkdir()
    with pytest.raises(ValueError, match=r"'notes\.txt', which no run wrote"):
        run_quickly(scenario(**ONLY), out, overwrite=True)
    assert (out / "summary.json").exists()
    (out / "notes.txt").rename(tmp_path / "notes.txt")
    again = run_quickly(scenario(**{**ONLY, "seed": 9}), out, overwrite=True)
    assert again["seed"] == 9
    assert not (out / ".adapter.new.0123abcd").exists()
    config = out / "config.toml"
    config.write_text('[tool]\nname = "mine"\n')
    with pytest.raises(ValueError, match=r"'config\.toml', which no run wrote"):
        run_quickly(scenario(**ONLY), out, overwrite=True)
    assert (out / "summary.json").exists()


def test_a_run_whose_artifacts_are_gone_cannot_go_on(tmp_path: Path) -> None:
    run_quickly(scenario(**ONLY), tmp_path)
    shutil.rmtree(tmp_path / "artifacts")
    with pytest.raises(ValueError, match=r"cannot be gone on with: no artifact .* --overwrite"):
        run_quickly(scenario(**ONLY), tmp_path, resume=True)


def test_fedavg_is_dense_whatever_the_scenario_compresses() -> None:
    rival = fedavg_of(scenario(down="int8", max_norm=1e-3, codec={"density": 0.1}))
    assert (rival.down, rival.max_norm, rival.codec.name) == ("fp32", None, "dense")
    assert fedavg_of(scenario(trains="b")).trains == "both"
    assert fedavg_of(scenario(down_codec={"name": "ternary"})).down_codec is None


def test_fedavg_is_neither_private_nor_gated() -> None:
    """With privacy every recipe is the mean: a private FedAvg would say nothing of its cost."""
    privacy = {"clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
    private = scenario(recipe={"method": "fedit"}, privacy=privacy)
    assert fedavg_of(private).federation(4).privacy is None
    assert fedavg_of(scenario(gate={})).federation(4).gate is None


def test_a_task_that_cannot_be_simulated_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class 'Nothing'"):
        run_quickly(scenario(task={"kind": "anabranch.simulation.synthetic:Nothing"}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_in_the_report(tmp_path: Path) -> None:
    strict = scenario(
        rounds=1, max_norm=1e-6, baselines={"local_only": False, "fedavg": False, "oracle": False}
    )
    with pytest.raises(RuntimeError, match=r"nothing was merged: 0 admitted.*0000: .*over the cap"):
        simulate(strict, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["code"] for row in summary["refused"]} == {"norm"}
    assert summary["rounds"][0]["status"] == "abandoned"
    assert summary["mean"]["merged"] == summary["mean"]["base"]
    assert summary["update_bytes"]["ours"] is None
    page = (tmp_path / "report.html").read_text()
    assert "over the cap" in page
    assert "abandoned" in page


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"quorum": 9}, "quorum: 9 updates cannot come from the 4 clients"),
        ({"recipe": {"method": "none"}}, "'none' is not a merge method"),
        ({"recipe": {"method": "multi_krum", "params": {"f": 2}}}, "f: 2 malicious need"),
        ({"task": {**TASK, "features": -1}}, "features"),
        ({"ranks": {"client-0004": 1}}, "ranks.client-0004: there is no such client"),
        ({"ranks": {"client-0001": 9}}, "ranks.client-0001: 9 is above 4"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_written(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        run_quickly(scenario(**changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_method_on_matrices_is_tried_on_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vectors it would take the mean, and what it cannot do would show in the first round."""

    def refuse(deltas: Sequence[Tensor], weights_C: Tensor, config: object) -> Tensor:
        raise ValueError(f"too few: {len(deltas)}")

    picky = replace(TSV_M, matrices=refuse)
    monkeypatch.setattr(engine_groups, "resolve", lambda *_: (picky, TSV_M.config()))
    with pytest.raises(ValueError, match=r"recipe: a round merges .* tsv_m cannot: too few: \d"):
        prepare(scenario())


def test_a_federation_learns_by_ranks_alone(tmp_path: Path) -> None:
    """Clients send signs and ranks of B, and the coordinator adds them up."""
    only = {"baselines": {"local_only": False, "fedavg": False, "oracle": False}}
    task = {**TASK, "features": 16, "hidden": 16, "rank": 16}
    given = {**only, "task": task, "trains": "b", "rounds": 5}
    ranks = run_quickly(
        scenario(**given, codec={"name": "ranks"}, recipe={"method": "rank_vote"}), tmp_path / "a"
    )
    mean = run_quickly(
        scenario(**given, codec={"name": "dense"}, recipe={"method": "mean"}), tmp_path / "b"
    )
    assert {row["status"] for row in ranks["rounds"]} == {"published"}
    gain = mean["mean"]["merged"] - mean["mean"]["base"]
    assert gain > 0.04
    assert ranks["mean"]["merged"] - ranks["mean"]["base"] > 0.8 * gain
    assert ranks["update_bytes"]["ours"] < 0.5 * mean["update_bytes"]["ours"]


def test_a_federation_learns_by_a_vote_on_products(tmp_path: Path) -> None:
    only = {"baselines": {"local_only": False, "fedavg": False, "oracle": False}}
    vote = {"method": "rank_vote", "params": {"approvals": 0.3, "density": 0.3}}
    summary = run_quickly(scenario(**only, codec={"name": "dense"}, recipe=vote), tmp_path)
    assert summary["mean"]["merged"] > summary["mean"]["base"] + 0.08


def test_the_report_says_who_stood_out_and_why(tmp_path: Path) -> None:
    suspicion = {"action": "mask_module", "threshold": 0.5, "signals": ["spectrum", "energy"]}
    one = scenario(
        rounds=2, quorum=4,
        recipe={"method": "mean", "suspicion": suspicion},
        baselines={"local_only": False, "fedavg": False, "oracle": False},
    )  # fmt: skip
    summary = simulate(one, tmp_path / "out")
    assert [row["status"] for row in summary["rounds"]] == ["published"] * 2
    found = summary["suspicions"]
    assert {row["round"] for row in found} == {1, 2}
    assert {row["action"] for row in found} <= {"mask_module", "note"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Contributions that stood out" in page
    assert "times the cohort" in page or "singular direction" in page
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_suspicion_is_refused_where_too_few_are_merged(tmp_path: Path) -> None:
    one = scenario(quorum=3, recipe={"method": "mean", "suspicion": {}})
    with pytest.raises(ValueError, match="suspicion: of 3 contributions none can be told"):
        run_quickly(one, tmp_path / "out")

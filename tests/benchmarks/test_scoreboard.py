from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.scoreboard import adapters, federations, heat, vectors
from benchmarks.scoreboard.blocks import BLOCKS, Options
from benchmarks.scoreboard.cells import Cell, Found, Kept, run
from benchmarks.scoreboard.page import write_pages
from benchmarks.scoreboard.result import by_rule, interval, over_seeds
from benchmarks.scoreboard.rules import RECIPES, recipe
from benchmarks.scoreboard.upper import UpperText

from anabranch.aggregation.engine.groups import groups
from anabranch.client.lora import attach
from anabranch.client.lora import read_adapter as read_model
from anabranch.client.lora import write_adapter as write_model
from anabranch.client.task import TrainPlan
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.baselines import score
from anabranch.simulation.federation import run_federation
from anabranch.simulation.partitioned_text import PartitionedText
from anabranch.simulation.prepare import prepare
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire import decode_update

SMALL = vectors.Setting(entries=400, attackers=(0, 4), misjudged=((6, 4),), seeds=(0, 1))


def write(result: dict[str, Any], folder: Path) -> None:
    (folder / f"scoreboard-{result['block']}.json").write_text(json.dumps(result))
    write_pages(folder, folder)


def cell(rule: str, attack: str = "sign flip", f: int = 4, declared: int = 4) -> Cell:
    return Cell(rule, attack, f, declared, 0)


def test_cells_are_kept_one_by_one_and_not_measured_twice(tmp_path: Path) -> None:
    asked: list[Cell] = []

    def measure(one: Cell) -> Found:
        asked.append(one)
        if one.seed == 2:
            raise KeyboardInterrupt
        if one.rule == "b":
            raise ValueError("b: too many")
        return {"kappa": float(one.seed)}

    wanted = [Cell("a", "none", 0, 0, 0), Cell("b", "none", 0, 0, 1), Cell("a", "none", 0, 0, 2)]
    kept = Kept(tmp_path, "A", {"entries": 4})
    with pytest.raises(KeyboardInterrupt):
        run(measure, wanted, kept)
    told: list[tuple[int, int]] = []
    found = run(lambda one: {"kappa": 9.0}, wanted, kept, progress=lambda *done: told.append(done))
    assert list(found.values()) == [{"kappa": 0.0}, {"na": "b: too many"}, {"kappa": 9.0}]
    assert (len(asked), told) == (3, [(2, 3), (3, 3)])
    # Another setting is another board; names that read alike are other cells.
    assert Kept(tmp_path, "A", {"entries": 5}).get(wanted[0]) is None
    assert Cell("a b", "c", 0, 0, 0).file != Cell("a", "b c", 0, 0, 0).file
    assert not list(tmp_path.rglob("*.partial"))


def test_the_honest_spread_and_mean_are_what_the_setting_says() -> None:
    setting = vectors.Setting(entries=2000, mean=3.0)
    honest_HD = torch.cat([vectors.honest(setting, 20, seed)[None] for seed in range(5)])
    mean_D = honest_HD.double().mean(dim=1, keepdim=True)
    spread = (honest_HD - mean_D).square().sum(dim=2).mean()
    assert float(spread) == pytest.approx(19 / 20, rel=0.1)
    assert float(mean_D.norm(dim=2).mean()) == pytest.approx((9 + 1 / 20) ** 0.5, rel=0.05)
    assert torch.equal(honest_HD[3], vectors.honest(setting, 20, 3))


def test_kappa_of_mean_and_oracle_by_hand() -> None:
    """4 of 20 send −μ: the mean is μ·(16 − 4)/20, so it is .4 of μ away."""
    honest_HD = vectors.honest(SMALL, 16, 0).double()
    mean_D = honest_HD.mean(dim=0)
    spread = (honest_HD - mean_D).square().sum(dim=1).mean()
    found = vectors.measure(SMALL, cell("mean"))
    assert found["kappa"] == pytest.approx(float(0.16 * mean_D.square().sum() / spread), rel=1e-5)
    assert vectors.measure(SMALL, cell(vectors.ORACLE)) == {"kappa": 0.0}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("median", "Flower: FedMedian"),
        ("trimmed mean", "Flower: FedTrimmedAvg"),
        ("Multi-Krum", "Flower: MultiKrum"),
        ("median", "byzfl: Median"),
        ("trimmed mean", "byzfl: TrMean"),
        ("mean around median", "byzfl: Meamed"),
        ("NNM, trimmed mean", "byzfl: NNM, TrMean"),
    ],
)
def test_rivals_that_are_the_same_rule_get_the_same_cells(ours: str, theirs: str) -> None:
    for attack in ("sign flip", "IPM 2", "Mimic"):
        mine = vectors.measure(SMALL, cell(ours, attack))["kappa"]
        assert vectors.measure(SMALL, cell(theirs, attack))["kappa"] == pytest.approx(
            mine, rel=1e-3, abs=1e-6
        )


def test_what_cannot_be_says_why() -> None:
    for name, reason in (
        ("Flower: Bulyan", "9 malicious need 39"),
        ("Flower: MultiKrum", "9 malicious need 21"),
        ("byzfl: CAF", "f = 0"),
        ("Multi-Krum", "9 malicious need at least 21"),
    ):
        f = 0 if "f = 0" in reason else 9
        with pytest.raises(ValueError, match=reason):
            vectors.measure(SMALL, cell(name, "none" if f == 0 else "sign flip", f, f))


def test_every_recipe_can_be_read() -> None:
    for name in RECIPES:
        for f in (0, 2, 4):
            assert len(groups(recipe(name, f), ["m"], 20)) == 1


def test_rules_that_are_not_told_f_cannot_be_told_wrong() -> None:
    wanted = vectors.cells(SMALL, ["median", "trimmed mean", "Flower: FedTrimmedAvg"])
    wrong = {one.rule for one in wanted if one.f != one.declared}
    assert wrong == {"trimmed mean"}


def test_over_seeds_and_worst() -> None:
    found: dict[Cell, Found] = {}
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        found[Cell("a", "x", 2, 2, seed)] = {"kappa": value}
        found[Cell("a", "y", 2, 2, seed)] = {"kappa": 5.0}
        found[Cell("a", "none", 0, 0, seed)] = {"kappa": 0.5}
        found[Cell("a", "x", 2, 4, seed)] = {"na": "too many"}
    entries = over_seeds(found)
    assert entries[0]["kappa"] == 2.0
    assert entries[0]["ci95"]["kappa"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert interval([1.0]) is None
    assert by_rule(entries, "kappa") == {
        "a": {
            "tax": 0.5,
            "worst": {"2": {"attack": "y", "kappa": 5.0}},
            "misjudged": {"2 told 4": None},
        }
    }


def test_block_a_in_short_and_its_page(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    options = Options(tmp_path / "runs", quick=True, progress=lambda *done: told.append(done))
    result = BLOCKS["A"].run(options)
    assert told[-1][0] == told[-1][1] == len(result["cells"])
    rows = {row["rule"]: row for row in result["rules"]}
    assert rows["mean"]["tax"] == pytest.approx(0, abs=1e-9)
    assert rows["mean"]["worst"]["4"]["attack"] == "adaptive"
    assert rows["mean"]["worst"]["4"]["kappa"] > 100
    assert rows["NNM, trimmed mean"]["worst"]["4"]["kappa"] < 0.3
    assert "f = 4: " in BLOCKS["A"].text(result)
    write(result, tmp_path)
    page = (tmp_path / "scoreboard.md").read_text()
    assert "| Flower: FedMedian |" in page
    assert "| NNM, trimmed mean | " in page.split("### Told wrong")[1]
    assert "honest-only oracle, sign flip, f = 4: 0" in (tmp_path / "scoreboard.html").read_text()
    assert (tmp_path / "scoreboard-A.png").read_bytes().startswith(b"\x89PNG")


def test_colours_run_from_good_to_bad_and_grey_is_neither() -> None:
    entries = {("a", "x", 2): {"na": "too many"}}
    drawn = heat.Heat("t", "kappa", 0.01, 10.0, True, ["a"], [("x", 2)], entries)
    assert drawn.value("a", ("x", 2)) is None
    assert drawn.colour(None) == heat.MISSING
    assert drawn.colour(1e-9) == drawn.colour(0.01) != drawn.colour(10.0) == drawn.colour(1e9)
    assert 'title="a, x, f = 2: too many">n/a' in heat.table(drawn)


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    wanted = [cell("mean"), cell("median"), cell("Multi-Krum", "sign flip", 9, 9)]
    alone = run(asdict, wanted, Kept(tmp_path, "one", {}))
    assert run(asdict, wanted, Kept(tmp_path, "two", {}), workers=2, batch=3) == alone
    assert alone[wanted[2]]["f"] == 9


def test_block_b_in_short(tmp_path: Path) -> None:
    result = BLOCKS["B"].run(Options(tmp_path / "runs", quick=True))
    cells = {(one["rule"], one["attack"]): one for one in result["cells"]}
    assert set(cells) == {(r, a) for r in ("mean", "robust") for a in ("none", "sign flip")}
    calm = cells["mean", "none"]["accuracy"]
    for one in cells.values():
        assert one["cad"] == pytest.approx(calm - one["accuracy"])
    assert cells["mean", "sign flip"]["accuracy"] != calm
    write(result, tmp_path)
    page = (tmp_path / "scoreboard.md").read_text()
    assert "### IID" in page
    assert (tmp_path / "scoreboard-B-IID.png").exists()


def test_block_c_in_short_on_numbers(tmp_path: Path) -> None:
    """What is asked of the task is what the real model is asked for."""
    options = Options(tmp_path / "runs", quick=True)
    result = BLOCKS["C"].run(options)
    found = {(one["recipe"], one["attack"], one["fraction"]): one for one in result["cells"]}
    assert set(found) == {("mean", "none", 0.0), ("mean", "backdoor", 0.2)}
    calm, one = found.values()
    assert one["gain"] == pytest.approx(one["asr"] - one["floor_asr"], abs=1e-3)
    assert one["gain"] > 5
    assert calm["lost"] == calm["gain"] == 0
    assert 20 < one["oracle_acc"] <= 100
    write(result, tmp_path)
    assert "| mean | backdoor | 1 | " in (tmp_path / "scoreboard.md").read_text()
    # Nothing is trained again: the replies are there.
    replies = sorted((tmp_path / "runs").glob("C-replies-*/seed-0/*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in replies}
    assert len(before) == 8
    cell = Cell("median", "backdoor", 1, 1, 0)
    adapters.measure(adapters.QUICK, tmp_path / "runs", cell)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_one_shot_replies_are_a_federation_s(tmp_path: Path) -> None:
    """To the bit: a second round, after one in which nobody attacked."""
    setting = replace(adapters.QUICK, warm=1, warm_steps=10, steps=10, attackers=(2,))
    cohort, scorer = adapters.opened(setting, 0, tmp_path / "runs")
    one = federations.scenario(replace(setting, rounds=2), Cell("mean", "LoBAM", 2, 2, 0))
    late = one.attackers[0].model_copy(update={"from_round": 2})
    one = one.model_copy(update={"attackers": (late,)})
    run_federation(one, tmp_path, prepare(one))
    replies = [*map(cohort.honest, range(3)), *cohort.colluding("LoBAM", adapters.band("LoBAM", 2))]
    store = FolderStore(tmp_path)
    for row in store.contributions(2):
        mine = replies[int(row.client.removeprefix("client-"))]
        layout = {name: tuple(tensor.shape) for name, tensor in mine.items()}
        _, sent = decode_update(store.get(row.digest), layout)
        assert all(torch.equal(sent[name], mine[name]) for name in sent)
    merged = read_adapter(tmp_path / "adapter")
    assert scorer.accuracy(merged, cohort.session.task, "clean") == pytest.approx(
        100 * score(cohort.session, merged)["test"]["group-0"]["accuracy"]
    )


def test_rivals_merge_block_c_s_replies(tmp_path: Path) -> None:
    """Flower's median is that of each entry, head and adapter alike."""
    cohort, _ = adapters.opened(adapters.QUICK, 0, tmp_path / "runs")
    replies = [cohort.honest(partition) for partition in range(3)]
    merged = adapters.merged_by("Flower: FedMedian", 1, cohort, replies).tensors()
    start = cohort.start(cohort.measured).tensors()
    assert set(replies[0]) == set(start)
    for name, before in start.items():
        middle = torch.stack([one[name] for one in replies]).median(dim=0).values
        assert torch.equal(merged[name], before + middle)
    with pytest.raises(ValueError, match="Bulyan: 1 malicious need 7"):
        adapters.merged_by("Flower: Bulyan", 1, cohort, replies)


def test_block_c_s_federations_in_short(tmp_path: Path) -> None:
    result = BLOCKS["C"].run(Options(tmp_path, quick=True, rounds=2, only="backdoor"))
    one = next(one for one in result["cells"] if one["attack"] == "backdoor")
    assert one["f"] == 2
    assert one["gain"] > 20


def test_the_oracle_takes_the_honest_clients_alone() -> None:
    """As their refused updates leave it: not the mean of all."""
    told = Cell(vectors.ORACLE, adapters.ANY, 2, 2, 0)
    oracle = federations.scenario(adapters.QUICK, told)
    assert oracle.quorum == 3
    assert oracle.attackers[0].kind == "lying_manifest"
    every = {one.attack for one in adapters.cells(adapters.FULL)}
    assert every == {adapters.ANY, "none", *adapters.ATTACKS, *adapters.HARDER}


def test_upper_layers_give_the_whole_encoder_s_logits() -> None:
    """With the adapter on the upper layers of the whole model: what lies below is frozen."""
    told: dict[str, Any] = {
        "datasets": ["sentiment"], "head": "trained", "max_length": 16, "clients_per_dataset": 2,
        "train_examples": 12, "test_examples": 20, "precision": "fp32",
    }  # fmt: skip
    layers = [f"layer.{n}.attention.self.{of}" for n in (4, 5) for of in ("query", "value")]
    found = []
    for task in (UpperText(upper_layers=2, **told), PartitionedText(target_modules=layers, **told)):
        model = attach(task.load_base(), task.lora_config())
        first = read_model(model)
        generator = torch.Generator().manual_seed(0)
        drawn = {
            name: 0.05 * torch.randn(part.shape, generator=generator)
            for name, part in sorted(first.tensors().items(), key=lambda one: one[0][-30:])
        }
        write_model(model, first.with_tensors(drawn))
        plan = TrainPlan(steps=2, batch_size=8, learning_rate=1e-3)
        found.append((task.evaluate(model, 0, "test"), task.train(model, 1, plan)))
    assert found[0][0]["loss"] == pytest.approx(found[1][0]["loss"], rel=1e-4)
    assert found[0][0]["accuracy"] == found[1][0]["accuracy"]
    assert found[0][1]["train-loss"] == pytest.approx(found[1][1]["train-loss"], rel=1e-4)


def test_only_what_is_asked_is_measured_and_all_that_is_kept_counts(tmp_path: Path) -> None:
    wanted = [cell("a"), cell("b")]
    kept = Kept(tmp_path, "X", {})
    Options(tmp_path, only="a").measured(asdict, wanted, kept)
    found = Options(tmp_path, only="b").measured(asdict, wanted, kept)
    assert list(found) == wanted
    fewer = Options(tmp_path, only="a").measured(asdict, wanted, Kept(tmp_path, "Y", {}))
    assert list(fewer) == wanted[:1]
    assert Options(tmp_path, seeds=2).first((0, 1, 2)) == (0, 1)

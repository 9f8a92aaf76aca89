"""Does merging pay? Eight text tasks fine-tuned apart from one base, merged by every method.

Each task's head is fixed, made of the frozen base's embedding of its label names, so that all a
task learns sits in its adapter and a merge can lose it. A merge is judged by its test accuracy over
that of the task's own adapter, averaged over the tasks. Parameters and λ are chosen on validation
texts, then the test texts are scored once.

Adapters and scores are kept under ``runs/quality``: a stopped run goes on where it was. The full
result also writes ``docs/quality.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from anabranch.client.task import HeldOut
from anabranch.vectors import TaskVector, task_vector
from benchmarks.harness import Row, main
from benchmarks.quality_adapters import Setting, log, open_seed, trained
from benchmarks.quality_grid import SIZES, UNSCALED, Params, params_tried
from benchmarks.quality_page import spread, write_page
from benchmarks.quality_scores import Accuracies, Score, Scoreboard, merged, size_of

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "quality"

TASKS = ("bbc", "movies", "spam", "reuters", "newsgroups", "author", "text-kind", "health")

FULL = Setting(
    name="eight-tasks",
    task="anabranch.simulation.partitioned_text:PartitionedText",
    params={
        "datasets": TASKS,
        "clients_per_dataset": 1,
        "rank": 16,
        "alpha": 32.0,
        # Every linear layer but the pooler's, which mean pooling does not read.
        "target_modules": ("query", "key", "value", "intermediate.dense", "output.dense"),
        "validation_examples": 100,
        "test_examples": 250,
    },
    steps=150,
    batch_size=16,
    learning_rate=1e-3,
    seeds=(1, 2, 3),
)

QUICK = Setting(
    name="quick",
    task=FULL.task,
    params={
        **FULL.params,
        "datasets": ("author", "text-kind", "health"),
        "validation_examples": 30,
        "test_examples": 60,
    },
    steps=15,
    batch_size=16,
    learning_rate=2e-3,
    seeds=(1,),
)
QUICK_METHODS = ("mean", "task_arithmetic", "ties", "tsv_m", "iso_c")


@dataclass(frozen=True)
class Chosen:
    """What one method came to in one repetition.

    Attributes:
        params: Its parameters, chosen on validation.
        size: Norm of the merged task vector over the mean norm, chosen likewise; None if λ = 1.
        scale: λ that gives this norm.
        accuracy: Test accuracy by group.
        normalised: The same over that of the group's own adapter.
    """

    params: Params
    size: float | None
    scale: float
    accuracy: Accuracies
    normalised: Accuracies


class Repetition:
    """One seed: its adapters and how merges of them score."""

    def __init__(self, setting: Setting, seed: int, runs: Path) -> None:
        session = open_seed(setting, seed)
        self.seed = seed
        self.adapters = trained(setting, session, seed, runs)
        self.rank = next(iter(session.template.lora.values())).rank
        self.groups = tuple(self.adapters)
        self._board = Scoreboard(session, setting.folder(runs, seed) / "scores.jsonl")
        self._mean_size = fmean(size_of(task_vector(one)) for one in self.adapters.values())
        nothing = TaskVector({})
        self.zero_shot = self._test("base", self.groups, nothing)
        self.individual: Accuracies = {}
        for group, adapter in self.adapters.items():
            self.individual |= self._test(f"alone: {group}", [group], task_vector(adapter))

    def _test(self, what: str, groups: Sequence[str], change: TaskVector) -> Accuracies:
        return self._board.score(what, "test", groups, lambda: (change, 1.0)).accuracy

    def normalised(self, accuracy: Accuracies) -> Accuracies:
        """Accuracy over that of the group's own adapter."""
        return {group: accuracy[group] / self.individual[group] for group in self.groups}

    def unscaled(self) -> Chosen:
        """The mean as it is."""
        accuracy = self._test("mean", self.groups, merged("mean", {}, self.adapters))
        return Chosen({}, None, 1.0, accuracy, self.normalised(accuracy))

    def choose(self, method: str, tried: Sequence[Params]) -> Chosen:
        """Choose the size, then the parameters, on validation; score that on test."""
        # One merge at a time is held: a dense one is as large as the base.
        latest: dict[str, TaskVector] = {}

        def score(split: HeldOut, params: Params, size: float) -> Score:
            name = f"{method} {json.dumps(params)}"

            def make() -> tuple[TaskVector, float]:
                if name not in latest:
                    latest.clear()
                    latest[name] = merged(method, params, self.adapters)
                return latest[name], size * self._mean_size / size_of(latest[name])

            return self._board.score(f"{name} size {size}", split, self.groups, make)

        def on_validation(candidate: tuple[Params, float]) -> float:
            return fmean(score("validation", *candidate).accuracy.values())

        size, before = SIZES[0], 0.0
        for larger in SIZES:
            reached = on_validation((tried[0], larger))
            if reached < before:
                break
            if reached > before:
                size, before = larger, reached
        # max() takes the first of equals.
        params, _ = max(((params, size) for params in tried), key=on_validation)
        final = score("test", params, size)
        normalised = self.normalised(final.accuracy)
        mean = fmean(normalised.values())
        log(f"seed {self.seed}: {method} {params} size {size}, λ {final.scale:.3g}: {mean:.3f}")
        return Chosen(params, size, final.scale, final.accuracy, normalised)


def compare(setting: Setting, runs: Path, wanted: tuple[str, ...] | None) -> Iterator[Row]:
    """A row per method, means over the seeds.

    Args:
        setting: What is trained.
        runs: Where it is kept.
        wanted: Methods; None stands for all.
    """
    found: dict[str, list[Chosen]] = {}
    references: dict[str, list[Accuracies]] = {"individual": [], "zero-shot": []}
    tasks = 0
    for seed in setting.seeds:
        repetition = Repetition(setting, seed, runs)
        tasks = len(repetition.groups)
        references["individual"].append(repetition.individual)
        references["zero-shot"].append(repetition.zero_shot)
        if wanted is None or "mean" in wanted:
            found.setdefault(UNSCALED, []).append(repetition.unscaled())
        for method, tried in params_tried(repetition.rank).items():
            if wanted is None or method in wanted:
                found.setdefault(method, []).append(repetition.choose(method, tried))
    scenario = f"{tasks} tasks, {len(setting.seeds)} seed{'s' * (len(setting.seeds) > 1)}"
    note = "mean over tasks and seeds of test accuracy over that of the task's own adapter"
    for name, accuracies in references.items():
        ratios = [
            fmean(one[group] / own[group] for group in own)
            for one, own in zip(accuracies, references["individual"], strict=True)
        ]
        detail: dict[str, Any] = {"seeds": ratios, "accuracy": average(accuracies)}
        yield Row(name, fmean(ratios), None, "", scenario, note, detail=detail)
    for method, chosen in found.items():
        ratios = [fmean(one.normalised.values()) for one in chosen]
        detail = {
            "seeds": ratios,
            "standard_error": spread(ratios),
            "accuracy": average([one.accuracy for one in chosen]),
            "normalised": average([one.normalised for one in chosen]),
            "chosen": [{k: asdict(one)[k] for k in ("params", "size", "scale")} for one in chosen],
        }
        yield Row(method, fmean(ratios), None, "", scenario, note, detail=detail)


def average(several: list[Accuracies]) -> Mapping[str, float]:
    """Mean by group."""
    return {group: fmean(one[group] for one in several) for group in several[0]}


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """All rows, or those of the methods whose names hold ``only``."""
    known = QUICK_METHODS if quick else ("mean", *params_tried(1))
    wanted = tuple(name for name in known if only is None or only in name)
    return compare(QUICK if quick else FULL, RUNS, wanted)


if __name__ == "__main__":
    kept = main("quality", measure)
    if kept is not None:
        write_page(kept, ROOT / "docs" / "quality.md")

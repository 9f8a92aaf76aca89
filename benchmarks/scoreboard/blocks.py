"""The blocks: which cells each has, and how its result reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anabranch.simulation.summary import machine
from benchmarks.scoreboard import adapters, cost, federations, models, vectors
from benchmarks.scoreboard.cells import Cell, Found, Kept, Measure, Progress, run
from benchmarks.scoreboard.result import by_rule, over_seeds
from benchmarks.scoreboard.rules import OURS
from benchmarks.scoreboard.vectors import ORACLE

Result = dict[str, Any]
"""What a block's JSON file holds."""


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        runs: Where finished cells are kept.
        quick: One seed and few cells.
        workers: Processes.
        seeds: The first so many repetitions; None takes all.
        only: Measure only cells whose rule or attack is named so; what is kept counts all the same.
        progress: Told of every cell.
        rounds: Block C: federations of so many rounds in place of the one-shot form.
    """

    runs: Path
    quick: bool = False
    workers: int = 1
    seeds: int | None = None
    only: str | None = None
    progress: Progress = lambda done, total: None
    rounds: int | None = None

    def measured(
        self, measure: Measure, cells: Sequence[Cell], kept: Kept, batch: int = 1
    ) -> dict[Cell, Found]:
        """What was asked for, and everything else that is kept."""
        chosen = [one for one in cells if self.only in (None, one.rule, one.attack)]
        run(measure, chosen, kept, workers=self.workers, batch=batch, progress=self.progress)
        return {cell: found for cell in cells if (found := kept.get(cell)) is not None}

    def first(self, seeds: tuple[int, ...]) -> tuple[int, ...]:
        """The repetitions asked for."""
        return seeds[: self.seeds]


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        run: Measures what is missing and gives the result.
        figure: What its text shows, where smaller is better.
    """

    run: Callable[[Options], Result]
    figure: str

    def text(self, result: Mapping[str, Any]) -> str:
        """Tax and worst attack by rule, for a terminal."""
        lines = [f"{'rule':<40} {'f = 0':>8}  worst {self.figure}"]
        for row in result["rules"]:
            tax = "n/a" if row["tax"] is None else f"{row['tax']:.3f}"
            worst = [
                f"f = {f}: n/a"
                if one is None
                else f"f = {f}: {one[self.figure]:.3g} {one['attack']}"
                for f, one in row["worst"].items()
            ]
            name = " ".join(filter(None, (row.get("where"), row["rule"])))
            lines.append(f"{name:<40} {tax:>8}  {'; '.join(worst)}")
        return "\n".join(lines)


def _result(block: str, options: Options, setting: Any, figure: str, **rest: Any) -> Result:
    return {
        "block": block,
        "machine": machine(),
        "quick": options.quick,
        "setting": asdict(setting),
        "figure": figure,
        **rest,
    }


QUICK_RULES = (vectors.ORACLE, "mean", "NNM, trimmed mean", "Flower: FedMedian")


def run_vectors(options: Options) -> Result:
    """Block A, and what the rules cost."""
    setting, wanted = vectors.FULL, (vectors.ORACLE, *vectors.rules())
    if options.quick:
        setting = vectors.Setting(entries=500, attackers=(0, 4), misjudged=((6, 4),), seeds=(0,))
        wanted = QUICK_RULES
    setting = replace(setting, seeds=options.first(setting.seeds))
    found = options.measured(
        partial(vectors.measure, setting),
        vectors.cells(setting, wanted),
        Kept(options.runs, "A", setting.drawn()),
        batch=29,
    )
    entries = over_seeds(found)
    rules = by_rule(entries, vectors.MEASURED)
    costs = {} if options.quick else run_costs(options, setting)
    rows = []
    for name, row in rules.items():
        known = vectors.rules().get(name)
        about = {"whose": known.whose, "note": known.note} if known else {"whose": OURS, "note": ""}
        rows.append({"rule": name, **row, **about, **costs.get(name, {})})
    return _result("A", options, setting, vectors.MEASURED, rules=rows, cells=entries)


def run_costs(options: Options, setting: vectors.Setting) -> dict[str, Found]:
    """Seconds and peak memory by rule: one at a time, while nothing else of ours runs."""
    f = setting.attackers[len(setting.attackers) // 2]
    kept = Kept(options.runs, "cost", {"entries": cost.ENTRIES, "of": cost.CONTRIBUTIONS})
    cells = [Cell(name, cost.COST, f, f, 0) for name in vectors.rules()]
    found = replace(options, workers=1).measured(cost.measure, cells, kept)
    return {cell.rule: {} if "na" in one else one for cell, one in found.items()}


def run_models(options: Options) -> Result:
    """Block B."""
    setting = models.QUICK if options.quick else models.FULL
    setting = replace(setting, seeds=options.first(setting.seeds))
    wanted = models.cells(setting, models.RULES)
    if options.quick:
        wanted = models.cells(setting, ("robust",), ("IID",), ("sign flip",))
    kept = Kept(options.runs, "B", setting.trained())
    found = models.with_cad(options.measured(partial(models.measure, setting), wanted, kept))
    entries = over_seeds(found)
    rows = [
        {"rule": name, "where": where, **row}
        for where in models.WHERE
        for name, row in by_rule(
            [entry for entry in entries if entry["where"] == where], models.MEASURED
        ).items()
    ]
    return _result("B", options, setting, models.MEASURED, rules=rows, cells=entries)


def run_adapters(options: Options) -> Result:
    """Block C: ``cells`` has ``recipe`` and ``fraction`` besides, figures in percent."""
    setting = adapters.QUICK if options.quick else adapters.FULL
    setting = replace(setting, seeds=options.first(setting.seeds))
    measure: Measure = partial(adapters.measure, setting, options.runs)
    if options.rounds is not None:
        setting = replace(setting, rounds=options.rounds, attackers=(2,), seeds=setting.seeds[:1])
        measure = partial(federations.measure_rounds, setting)
    # Rivals merge replies, and have no federation of ours.
    rivals = adapters.RIVALS if options.rounds is None else ()
    wanted = adapters.cells(setting, (*adapters.RULES, *rivals))
    if options.quick:
        wanted = adapters.cells(setting, ("mean",), ("backdoor",))
    if options.rounds is not None and options.only is not None:
        # What a federation each costs is asked for by name.
        asked = (options.only, ORACLE)
        wanted = [one for one in wanted if {one.rule, one.attack} & {*asked}]
        options = replace(options, only=None)
    # A worker takes a seed: its texts and replies are read once.
    batch = max(1, len(wanted) // len(setting.seeds))
    kept = Kept(options.runs, "C", setting.scored())
    found = adapters.beside_oracle(options.measured(measure, wanted, kept, batch))
    entries = [
        {"recipe": one["rule"], "fraction": one["f"] / setting.clients, **one}
        for one in over_seeds(found)
        # Of a run that was stopped, what is there of one seed is not there of the next.
        if "na" in one or len(one["seeds"]["acc"]) == len(setting.seeds)
    ]
    rows = [{"rule": name, **row} for name, row in by_rule(entries, adapters.MEASURED).items()]
    attacks = [one for one in adapters.ATTACKS if any(one == cell.attack for cell in wanted)]
    return _result(
        "C", options, setting, adapters.MEASURED, rules=rows, cells=entries, attacks=attacks
    )


BLOCKS: Mapping[str, Block] = {
    "A": Block(run_vectors, vectors.MEASURED),
    "B": Block(run_models, models.MEASURED),
    "C": Block(run_adapters, adapters.MEASURED),
}
"""By letter."""

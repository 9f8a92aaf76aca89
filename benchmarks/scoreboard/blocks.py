"""The blocks: which cells each has, and how its result reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anabranch.simulation.summary import machine
from benchmarks.scoreboard import cost, vectors
from benchmarks.scoreboard.cells import Cell, Kept, Progress, run
from benchmarks.scoreboard.result import by_rule, over_seeds
from benchmarks.scoreboard.rules import OURS

Result = dict[str, Any]
"""What a block's JSON file holds."""


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        runs: Where finished cells are kept.
        quick: One seed and few rules.
        workers: Processes.
        progress: Told of every cell.
    """

    runs: Path
    quick: bool
    workers: int
    progress: Progress = lambda done, total: None


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        run: Measures what is missing and gives the result.
        text: The result for a terminal.
    """

    run: Callable[[Options], Result]
    text: Callable[[Mapping[str, Any]], str]


QUICK_RULES = (vectors.ORACLE, "mean", "NNM, trimmed mean", "Flower: FedMedian")


def run_vectors(options: Options) -> Result:
    """Block A, and what the rules cost."""
    setting, wanted = vectors.FULL, (vectors.ORACLE, *vectors.rules())
    if options.quick:
        setting = vectors.Setting(entries=500, attackers=(0, 4), misjudged=((6, 4),), seeds=(0,))
        wanted = QUICK_RULES
    found = run(
        partial(vectors.measure, setting),
        vectors.cells(setting, wanted),
        Kept(options.runs, "A", setting.drawn()),
        workers=options.workers,
        batch=29,
        progress=options.progress,
    )
    entries = over_seeds(found)
    rules = by_rule(entries, vectors.MEASURED)
    for name, row in rules.items():
        known = vectors.rules().get(name)
        row |= {"whose": known.whose if known else OURS, "note": known.note if known else ""}
    costs = {} if options.quick else run_costs(options, setting)
    return {
        "block": "A",
        "machine": machine(),
        "quick": options.quick,
        "setting": asdict(setting),
        "figure": vectors.MEASURED,
        "rules": [{"rule": name, **row, **costs.get(name, {})} for name, row in rules.items()],
        "cells": entries,
    }


def run_costs(options: Options, setting: vectors.Setting) -> dict[str, dict[str, float]]:
    """Seconds and peak memory by rule: one at a time, each in a process of its own."""
    f = setting.attackers[len(setting.attackers) // 2]
    kept = Kept(options.runs, "cost", {"entries": cost.ENTRIES, "of": cost.CONTRIBUTIONS})
    cells = [Cell(name, cost.COST, f, f, 0) for name in vectors.rules()]
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        # A pool of one process that ends with it.
        result = run(cost.measure, [cell], kept, workers=2)[cell]
        found[cell.rule] = {} if "na" in result else result
    return found


def vectors_text(result: Mapping[str, Any]) -> str:
    """Tax and worst attack by rule."""
    lines = [f"{'rule':<32} {'f = 0':>8}  worst"]
    for row in result["rules"]:
        tax = "n/a" if row["tax"] is None else f"{row['tax']:.3f}"
        worst = [
            f"f = {f}: n/a" if one is None else f"f = {f}: {one['kappa']:.3g} {one['attack']}"
            for f, one in row["worst"].items()
        ]
        lines.append(f"{row['rule']:<32} {tax:>8}  {'; '.join(worst)}")
    return "\n".join(lines)


BLOCKS: Mapping[str, Block] = {"A": Block(run_vectors, vectors_text)}
"""By letter."""

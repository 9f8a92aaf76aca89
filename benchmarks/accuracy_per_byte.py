"""Accuracy against bytes: the demo's federation under one codec after the other, three seeds.

Everything but the codec is the quick start's. Bytes are those of a client's whole update;
accuracy is the merged adapter's on test, the mean over the tasks. A run takes minutes: what each
found is kept in ``results/accuracy_per_byte_runs.json`` by the hash of its scenario, so that the
curve can be made in several sittings; one that was stopped goes on in ``runs/accuracy_per_byte``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from anabranch.simulation.run import simulate
from anabranch.simulation.scenario import Scenario, load_scenario
from anabranch.vectors.select import keep
from anabranch.wire.codecs import registry
from anabranch.wire.codecs.dense import FP16, Plain
from anabranch.wire.config import CodecConfig
from benchmarks.harness import RESULTS, Row, main

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "accuracy_per_byte"
KEPT = RESULTS / "accuracy_per_byte_runs.json"
PLOT = ROOT / "docs" / "accuracy_per_byte.png"
SEEDS = (1, 2, 3)

Found = dict[str, Any]
"""What a run found: codec, seed, accuracy, bytes."""

Cell = tuple[str, int]
"""A codec's name and a seed."""

DENSITIES = (0.2, 0.1, 0.05, 0.02)
BARS = {0.1: 0.99, 0.05: 0.98}
"""The least share of the dense accuracy, with error feedback, by density."""

FLASC, FLASC_DENSITY = "FLASC, fp16 top-k", 0.0175
"""Its density at 10%'s bytes: 16 bits and a place of 17 for each entry. It keeps no residual."""
DARE_DENSITY = 0.067
"""The same of random drops at 8.5 bits an entry and no place."""


@dataclass(frozen=True)
class Point:
    """A codec in the curve.

    Attributes:
        name: For people.
        codec: How updates are encoded.
        kind: Which curve it is part of.
    """

    name: str
    codec: CodecConfig
    kind: str


def points() -> list[Point]:
    """All that is compared, the dense one first."""
    found = [Point("dense fp32", CodecConfig(name="dense", feedback=0), "dense")]
    for density in DENSITIES:
        for feedback in (1.0, 0.0):
            kind = "ternary" if feedback else "ternary, no feedback"
            codec = CodecConfig(density=density, feedback=feedback)
            found.append(Point(f"{kind} {density:.0%}", codec, kind))
    for density in (0.05, 0.02):
        codec = CodecConfig(name="two-bit", density=density)
        found.append(Point(f"two-bit {density:.0%}", codec, "two-bit"))
    found.append(Point("ternary, 5.7 kB budget", CodecConfig(budget="5.7 kB"), "budget"))
    found.append(Point("rotated 1 bit (EDEN)", CodecConfig(name="rotated", bits=1), "rotated"))
    found.append(Point("sign (BitDelta)", CodecConfig(name="sign"), "sign"))
    dare = CodecConfig(name="dare", density=DARE_DENSITY, feedback=0)
    found.append(Point(f"DARE {DARE_DENSITY:.1%}", dare, "DARE"))
    flasc = CodecConfig(name="dense", dtype="fp16", density=FLASC_DENSITY, feedback=0)
    found.append(Point(FLASC, flasc, "FLASC"))
    return found


@contextmanager
def _flasc() -> Iterator[None]:
    """The codec of fp16 values keeps the largest entries only; its bytes are counted apart."""

    def reduce(tensor: Tensor, config: CodecConfig, seed: int) -> Plain:
        positions_k, values_k = keep(tensor, config.density)
        kept_n = torch.zeros(tensor.numel(), dtype=torch.float16)
        kept_n[torch.from_numpy(positions_k)] = torch.from_numpy(values_k).half()
        return Plain(kept_n.reshape(tensor.shape))

    before = registry.CODECS
    registry.CODECS = tuple(
        replace(codec, reduce=reduce) if codec is FP16 else codec for codec in before
    )
    try:
        yield
    finally:
        registry.CODECS = before


def scenario_of(point: Point, seed: int, base: Scenario) -> tuple[str, Scenario]:
    """The run's key among those that are kept, and what it simulates."""
    scenario = base.model_copy(update={"name": "bytes", "seed": seed, "codec": point.codec})
    # Defaults left out: a scenario that learns a new key is the same one.
    words = f"{point.name} {scenario.model_dump_json(exclude_defaults=True)}"
    return hashlib.sha256(words.encode()).hexdigest()[:16], scenario


def run(point: Point, key: str, scenario: Scenario) -> Found:
    """Simulate one federation, or go on where it was stopped."""
    folder = RUNS / key
    with _flasc() if point.name == FLASC else nullcontext():
        simulate(scenario, folder, resume=folder.exists())
    summary = json.loads((folder / "summary.json").read_text())
    size = summary["update_bytes"]["ours"]
    if point.name == FLASC:
        entries = summary["update_bytes"]["fp16"] / 2
        size = FLASC_DENSITY * entries * (16 + 17) / 8
    accuracy = summary["mean"]["merged"]
    return {"codec": point.name, "seed": scenario.seed, "accuracy": accuracy, "bytes": size}


def run_all(wanted: Sequence[Point], seeds: Sequence[int], base: Scenario) -> dict[Cell, Found]:
    """All runs, a process to a core, a whole curve of one seed first: what stops early says much.

    Returns:
        What each found or had found before, by the codec's name and the seed.
    """
    cells = [(point, seed, *scenario_of(point, seed, base)) for seed in seeds for point in wanted]
    kept: dict[str, Found] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    # Not forked: a copy of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _one_thread) as pool:
        begun = {
            pool.submit(run, point, key, scenario): key
            for point, _, key, scenario in cells
            if key not in kept
        }
        for done in as_completed(begun):
            kept[begun[done]] = done.result()
            beside = KEPT.with_suffix(".partial")
            beside.write_text(json.dumps(kept, indent=1) + "\n")
            beside.replace(KEPT)
            there = sum(key in kept for _, _, key, _ in cells)
            print(f"{there} of {len(cells)} federations", file=sys.stderr, flush=True)
    return {(point.name, seed): kept[key] for point, seed, key, _ in cells}


def _one_thread() -> None:
    torch.set_num_threads(1)


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """A row per codec; ``--quick`` runs one seed of the first three."""
    base = load_scenario(ROOT / "examples" / "quickstart.toml")
    none = {"local_only": False, "fedavg": False, "oracle": False}
    base = Scenario.model_validate({**base.model_dump(), "baselines": none, "evaluate_every": 0})
    wanted = [
        point
        for index, point in enumerate(points()[: 3 if quick else None])
        if not only or not index or only in point.name
    ]
    seeds = SEEDS[: 1 if quick else None]
    runs = run_all(wanted, seeds, base)
    dense = 0.0
    for point in wanted:
        found = [runs[point.name, seed] for seed in seeds]
        accuracies = [one["accuracy"] for one in found]
        size = fmean(one["bytes"] for one in found)
        dense = dense or fmean(accuracies)
        bar = BARS.get(point.codec.density) if point.kind == "ternary" else None
        yield Row(
            point.name, fmean(accuracies), dense, "dense", "the demo's federation",
            f"{size:,.0f} bytes an update", least={} if bar is None else {"ratio": bar},
            detail={
                "kind": point.kind, "bytes": size, "accuracies": accuracies,
                "spread": stdev(accuracies) if len(accuracies) > 1 else 0.0,
            },
        )  # fmt: skip


def plot(result: dict[str, Any]) -> None:
    """The curve, as a picture."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.6))
    rows = result["rows"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["bytes"])
        axes.errorbar(
            [row["bytes"] / 1000 for row in mine],
            [100 * row["ours"] for row in mine],
            yerr=[100 * row["spread"] / len(SEEDS) ** 0.5 for row in mine],
            marker="o", capsize=3, label=kind,
        )  # fmt: skip
    axes.axhline(100 * rows[0]["ours"], color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log", xlabel="kB of an update", ylabel="accuracy on test, %",
        title="The demo's federation, mean and standard error of three seeds",
    )  # fmt: skip
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=150)


if __name__ == "__main__":
    kept = main("accuracy_per_byte", measure)
    if kept is not None:
        plot(kept)

"""Merging beside mergekit, PEFT and FusionBench, on the same tensors in the same process.

Dense: 16 task vectors of one 2000 x 2000 matrix, fp32, standard normal; ours through the engine,
checks included. Adapters: 16 LoRA adapters of rank 16 on one 4096 x 4096 layer. A read is one
``torch.sum`` over all inputs: what no merge can do without.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_task_vectors
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter, LoraFactors, TaskVector
from anabranch.vectors.sparse import ternarise
from benchmarks import merge_rivals as rivals
from benchmarks.harness import Row, main

ROOT = Path(__file__).parents[1]
CLIENTS, THREADS, DENSITY = 16, 2, 0.2
SLOW_S = 5.0
DECODED = "decode, then dense kernel"
MERGEKIT, PEFT, FUSION_BENCH = "mergekit 0.1.5", "peft 0.21", "FusionBench 0.2.33"

DENSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"density": DENSITY}, {"density": DENSITY}),
    "mean": ({}, {}),
    "task_arithmetic": ({}, {}),
    "sce": ({"select": DENSITY}, {"select_topk": DENSITY}),
    "dare_ties": ({"density": DENSITY}, {"density": DENSITY}),
    "dare_linear": ({"density": DENSITY}, {"density": DENSITY}),
    "breadcrumbs": ({"density": DENSITY}, {"density": DENSITY, "gamma": 0.01}),
    "breadcrumbs_ties": ({"density": DENSITY}, {"density": DENSITY, "gamma": 0.01}),
    "della": ({"density": DENSITY, "epsilon": 0.1}, {"density": DENSITY, "epsilon": 0.1}),
}
"""Our parameters and mergekit's, by method."""

TERNARY = ("mean", "ties")

SPECTRAL = ("tsv_m", "iso_c")
"""Of adapters, by ours in the space they span and by FusionBench on dense ΔW."""

BARS: dict[tuple[str, str], dict[str, float]] = {
    ("ties", MERGEKIT): {"ratio": 1 / 30, "reads": 25},
    ("ties", PEFT): {"ratio": 1 / 15, "reads": 25},
    ("mean", MERGEKIT): {"ratio": 1 / 8},
    ("task_arithmetic", MERGEKIT): {"ratio": 1 / 8},
    ("sce", MERGEKIT): {"ratio": 1 / 8},
    ("dare_ties", MERGEKIT): {"ratio": 1 / 8},
    ("breadcrumbs", MERGEKIT): {"ratio": 1 / 8},
    ("della", MERGEKIT): {"ratio": 1 / 8},
    ("lora svd", f"{PEFT} svd"): {"ratio": 1 / 50},
    ("lora svd error", f"{PEFT} svd"): {"ours": 1e-5},
    ("lora ties svd", f"{PEFT} ties_svd"): {"ratio": 1 / 15},
    ("lora tsv_m", FUSION_BENCH): {"ratio": 1 / 30},
    ("lora tsv_m error", FUSION_BENCH): {"ours": 1e-5},
    ("lora iso_c", FUSION_BENCH): {"ratio": 1 / 30},
    ("lora iso_c error", FUSION_BENCH): {"ours": 1e-5},
    ("ternary mean", DECODED): {"ratio": 1 / 4},
    ("ternary ties", DECODED): {"ratio": 1 / 4},
    ("ties memory", MERGEKIT): {"ratio": 1 / 3},
    ("ties memory", PEFT): {"ratio": 1 / 3},
}
"""The most a figure may be (``harness.Row``), by row and rival."""

ALONE = ("median", "trimmed_mean", "magmax", "consensus")
"""Methods that neither rival has."""


def seconds(work: Callable[[], object], runs: int) -> float:
    """Median wall seconds of a call, after one that is not counted."""
    work()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def rival_seconds(work: Callable[[], object]) -> float:
    """The first call's wall seconds where it is slow, else the median of the next three."""
    started = time.perf_counter()
    work()
    first = time.perf_counter() - started
    return first if first > SLOW_S else seconds(work, 3)


def drawn_tensors(side: int) -> list[Tensor]:
    """Task vectors [side, side], one per client."""
    generators = [torch.Generator().manual_seed(client) for client in range(CLIENTS)]
    return [torch.randn(side, side, generator=generator) for generator in generators]


def drawn_adapters(size: int, rank: int) -> list[Adapter]:
    """One LoRA adapter per client on a layer [size, size], scaling 1."""
    adapters = []
    for client in range(CLIENTS):
        generator = torch.Generator().manual_seed(client)
        a_rn, b_mr = (
            torch.randn(shape, generator=generator) for shape in ((rank, size), (size, rank))
        )
        adapters.append(Adapter({rivals.LAYER: LoraFactors(a_rn, b_mr, float(rank))}))
    return adapters


def dense_rows(side: int, runs: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Entry-wise methods on dense task vectors."""
    scenario = f"{CLIENTS} x {side * side / 1e6:g}M fp32"
    tensors = drawn_tensors(side)
    vectors = [TaskVector({"w": tensor}) for tensor in tensors]

    def ours(name: str) -> float:
        recipe = Recipe(method=name, params=DENSE[name][0] if name in DENSE else {})
        return seconds(lambda: merge_task_vectors(vectors, recipe), max(runs, 3))

    def row(what: str, mine: float, theirs: float | None, rival: str, note: str = "") -> Row:
        read = seconds(lambda: [tensor.sum() for tensor in tensors], 2 * runs)
        note = note or f"seconds, median; the rival's of 3, of 1 where that took {SLOW_S:g} or more"
        return Row(what, mine, theirs, rival, scenario, note, reads=mine / read)

    for name, (_, parameters) in DENSE.items():
        if wanted(name):
            theirs = rival_seconds(lambda: rivals.mergekit(tensors, name, **parameters))  # noqa: B023
            yield row(name, ours(name), theirs, MERGEKIT)
    if wanted("ties"):
        yield row("ties", ours("ties"), rival_seconds(lambda: rivals.peft_ties(tensors)), PEFT)
    for name in ALONE:
        if wanted(name):
            yield row(name, ours(name), None, "", "seconds, median; neither rival has it")


def adapter_rows(size: int, runs: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """LoRA adapters merged as ΔW and brought back to their rank."""
    rank = 16
    scenario = f"{CLIENTS} LoRA r{rank}, {size} x {size}"
    adapters = drawn_adapters(size, rank)
    for what, rival, recipe in (
        ("lora svd", "svd", Recipe(method="task_arithmetic", refactor=Refactor(rank=rank))),
        (
            "lora ties svd",
            "ties_svd",
            Recipe(method="ties", params={"density": DENSITY}, refactor=Refactor(rank=rank)),
        ),
    ):
        if not wanted(what):
            continue
        mine = seconds(lambda: merge(adapters, recipe), runs)  # noqa: B023
        model = rivals.peft_model(adapters, size, rank)
        started = time.perf_counter()
        rivals.peft_merge(model, rival, rank, DENSITY)
        theirs = time.perf_counter() - started
        note = "seconds; the rival ran once, at its defaults (full SVD)"
        yield Row(what, mine, theirs, f"{PEFT} {rival}", scenario, note)
        found = merge(adapters, recipe).adapter.lora[rivals.LAYER].delta().dense()
        exact = rivals.dense_merge(adapters, recipe.method, DENSITY)
        gaps = [
            rivals.gap(exact, candidate, rank) for candidate in (found, rivals.peft_delta(model))
        ]
        note = "‖ΔW − rank-r‖ over the smallest there is (fp64), less 1"
        yield Row(f"{what} error", gaps[0], gaps[1], f"{PEFT} {rival}", scenario, note)


def spectral_rows(size: int, runs: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """TSV-M and Iso-C of LoRA adapters, all their directions kept, beside the same on dense ΔW."""
    rank = 16
    scenario = f"{CLIENTS} LoRA r{rank}, {size} x {size}"
    adapters = drawn_adapters(size, rank)
    for method in SPECTRAL:
        what = f"lora {method}"
        if not wanted(what):
            continue
        recipe = Recipe(method=method, refactor=Refactor(kind="stack"))
        mine = seconds(lambda: merge(adapters, recipe), runs)  # noqa: B023
        matrices = [adapter.lora[rivals.LAYER].delta().dense() for adapter in adapters]
        started = time.perf_counter()
        dense = rivals.fusion_bench(matrices, method)
        theirs = time.perf_counter() - started
        note = "seconds; the rival ran once, on ΔW multiplied out beforehand"
        yield Row(what, mine, theirs, FUSION_BENCH, scenario, note)
        expected = rivals.fusion_bench_in_the_core(adapters, method)
        found = merge(adapters, recipe).adapter.lora[rivals.LAYER].delta().dense()
        off = [rivals.distance(one, expected) for one in (found, dense)]
        note = (
            "relative distance from FusionBench's rule in the space the adapters span (fp64); "
            "dense, its answer is chance: see benchmarks/merge_rivals.py"
        )
        yield Row(f"{what} error", off[0], off[1], FUSION_BENCH, scenario, note)


def ternary_rows(side: int, runs: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Sparse ternary updates merged as they are, beside decoding them for the dense kernel."""
    updates, entries = 64, side * side
    scenario = f"{updates} x {entries / 1e6:g}M ternary, 5 %"
    if not any(wanted(f"ternary {rule}") for rule in TERNARY):
        return
    found = [
        ternarise(torch.randn(side, side, generator=torch.Generator().manual_seed(client)), 0.05)
        for client in range(updates)
    ]
    for rule in TERNARY:
        if not wanted(f"ternary {rule}"):
            continue
        recipe = Recipe(method=rule, params={"density": 1.0} if rule == "ties" else {})

        def as_they_are(recipe: Recipe = recipe) -> TaskVector:
            return merge_task_vectors([TaskVector({"w": one}) for one in found], recipe)

        def decoded(recipe: Recipe = recipe) -> TaskVector:
            return merge_task_vectors([TaskVector({"w": one.dense()}) for one in found], recipe)

        mine = seconds(as_they_are, runs)
        theirs = seconds(decoded, min(runs, 3))
        note = "seconds, median; beside our own merge of what they decode to, decoding included"
        yield Row(f"ternary {rule}", mine, theirs, DECODED, scenario, note)


def memory_rows(side: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Peak memory of a TIES merge, each side in a process of its own."""
    if not wanted("ties memory"):
        return

    def peak(who: str) -> float:
        command = [sys.executable, "-m", "benchmarks.merge_memory", who, str(side)]
        found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return float(found.stdout.split()[-1])

    mine = peak("ours")
    scenario = f"{CLIENTS} x {side * side / 1e6:g}M fp32"
    note = "bytes at the peak, inputs included, less what was resident before they were made"
    for who, name in (("mergekit", MERGEKIT), ("peft", PEFT)):
        yield Row("ties memory", mine, peak(who), name, scenario, note)


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """All rows; ``only`` names those to run, by part of what they measure."""
    torch.set_num_threads(THREADS)

    def wanted(what: str) -> bool:
        return only is None or only in f"{what} error"

    side, size, runs = (600, 512, 1) if quick else (2000, 4096, 5)
    rows = chain(
        dense_rows(side, runs, wanted),
        adapter_rows(size, runs, wanted),
        spectral_rows(size, runs, wanted),
        ternary_rows(side, runs, wanted),
        memory_rows(side, wanted),
    )
    unread = dict(BARS)
    for row in rows:
        yield replace(row, most=unread.pop((row.what, row.rival_name), {}))
    assert only or not unread, f"bars of rows that are not there: {sorted(unread)}"


if __name__ == "__main__":
    main("merge", measure)

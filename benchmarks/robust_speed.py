"""Robust rules beside ByzFL, on the same task vectors in the same process, two threads.

20 task vectors of a million entries, two of them far away; ours through the engine, checked too.
Where a step goes before a rule, both do both. ByzFL's geometric median takes its three steps, ours
goes on until it stands. ByzFL changes what it is given, so it gets a copy,
which is made before the clock starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.vectors import TaskVector
from benchmarks.harness import Row, main

CLIENTS, MALICIOUS, ENTRIES, QUICK_ENTRIES, THREADS = 20, 4, 1_000_000, 20_000, 2
BYZFL = "byzfl 0.0.11"

FAST, ENTRY = {"ratio": 1 / 8}, {"ratio": 1 / 4}
"""Bars: 8 times as fast where inner products do the work, 4 times entry by entry."""


def byzfl() -> Any:
    """Its rules alone: the package's own start imports data sets and models."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("byzfl is not installed; run `make install`")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec  # found again by who asks for it
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def rules(
    theirs: Any,
) -> dict[str, tuple[dict[str, Any], Callable[[Tensor], Any], dict[str, float]]]:
    """Recipe, ByzFL's call and bar, by name."""
    f = MALICIOUS
    nnm = [{"name": "nnm", "params": {"f": f}}]
    return {
        "geometric median": (
            {"method": "geometric_median", "params": {"nu": 0.1}},
            theirs.GeometricMedian(nu=0.1, T=3), FAST,
        ),
        "multi-krum": ({"method": "multi_krum", "params": {"f": f}}, theirs.MultiKrum(f), FAST),
        "nnm, mean": (
            {"method": "mean", "pre": nnm}, lambda x: theirs.Average()(theirs.NNM(f)(x)), FAST,
        ),
        "nnm, trimmed mean": (
            {"method": "trimmed_mean", "params": {"trim": f}, "pre": nnm},
            lambda x: theirs.TrMean(f)(theirs.NNM(f)(x)), {},
        ),
        "median": ({"method": "median"}, theirs.Median(), ENTRY),
        "trimmed mean": (
            {"method": "trimmed_mean", "params": {"trim": f}}, theirs.TrMean(f), ENTRY,
        ),
        "meamed": ({"method": "meamed", "params": {"f": f}}, theirs.Meamed(f), {}),
        "centred clipping": (
            {"method": "centred_clipping", "params": {"tau": 100.0, "steps": 3}},
            theirs.CenteredClipping(L=3, tau=100.0), {},
        ),
        "caf": ({"method": "caf", "params": {"f": f}}, theirs.CAF(f), {}),
    }  # fmt: skip


def seconds(work: Callable[[Any], object], prepare: Callable[[], Any], runs: int) -> float:
    """Median wall seconds of a call, after one that is not counted; its input is made before."""
    work(prepare())
    taken = []
    for _ in range(runs):
        given = prepare()
        started = time.perf_counter()
        work(given)
        taken.append(time.perf_counter() - started)
    return median(taken)


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """A row per rule."""
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    entries = QUICK_ENTRIES if quick else ENTRIES
    deltas_CD = torch.randn(entries, generator=generator) + torch.randn(
        CLIENTS, entries, generator=generator
    )
    deltas_CD[3] *= -5
    deltas_CD[7] *= 20
    vectors = [TaskVector({"m": delta_D.view(1000, -1)}) for delta_D in deltas_CD]
    scenario = f"{CLIENTS} x {entries / 1e6:g}M fp32, {THREADS} threads"
    for name, (given, rule, most) in rules(byzfl()).items():
        if only and only not in name and only not in scenario:
            continue
        ours = seconds(
            partial(merge_task_vectors, vectors), partial(Recipe.model_validate, given), 5
        )
        theirs = seconds(rule, deltas_CD.clone, 3)
        yield Row(name, ours, theirs, BYZFL, scenario, "seconds", most=most)


if __name__ == "__main__":
    main("robust_speed", measure)

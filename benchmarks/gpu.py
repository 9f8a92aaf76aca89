"""Merging on a GPU: every fused rule beside a copy of as many bytes, and beside torch.

16 task vectors of 8192 x 8192 in fp32, standard normal, on the device; 64 sparse ternary ones. A
rule moves the C contributions it reads and the one it writes; the copy it stands beside moves as
many bytes at the bandwidth measured for ``Tensor.copy_`` of 1 GiB, both ways counted. The fraction
of that bandwidth which a rule reaches is in the row's detail, and its bar is 70 %.

Without a CUDA device it says so and exits with 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.rows import TERNARY_SUM, WEIGHTED_SUM, load
from anabranch.aggregation.magnitude import tensor_kth
from anabranch.aggregation.method import MergeMethod, combine
from anabranch.aggregation.methods import BUILT_IN
from anabranch.vectors import TaskVector
from anabranch.vectors.sparse import ternarise
from benchmarks.harness import Row, main

CLIENTS, SIDE, RUNS, UPDATES = 16, 8192, 20, 64
FUSED = ("ties", "breadcrumbs_ties", "dare_linear", "dare_ties", "median", "trimmed_mean")
GOAL = {"ratio": 1 / 0.7}
"""The most a fused rule may take, in times of a copy of as many bytes."""
COPY, TORCH = "copy of as many bytes", "torch on the same device"


def seconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median wall seconds of a call, until the device is done; two are not counted."""
    taken = []
    for _ in range(runs + 2):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        taken.append(time.perf_counter() - started)
    return median(taken[2:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, size_bytes: int, runs: int) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, runs)


def rows(device: torch.device, side: int, clients: int, updates: int, runs: int) -> Iterator[Row]:
    """All rows.

    Args:
        device: Where.
        side: Of each task vector [side, side].
        clients: Dense task vectors.
        updates: Sparse ternary ones, each of a quarter as many entries.
        runs: Timed calls per figure.
    """
    yield from _dense(device, side, clients, runs)
    yield _ternary(device, side * side // 4, updates, runs)


def _dense(device: torch.device, side: int, clients: int, runs: int) -> Iterator[Row]:
    """Every fused rule twice, beside a copy and beside torch; selection; a whole merge."""
    entries = side * side
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    scenario = f"{clients} x {entries / 1e6:g}M fp32, {name}"
    bandwidth = copy_bandwidth(device, min(1 << 30, 4 * clients * entries), runs)
    generator = torch.Generator(device).manual_seed(0)
    deltas_CD = torch.randn(clients, entries, generator=generator, device=device)
    weights_C = torch.linspace(0.5, 2, clients, dtype=torch.float64)
    moved = (clients + 1) * 4 * entries

    def beside_a_copy(what: str, work: Callable[[], object], size_bytes: int, **more: Any) -> Row:
        ours = seconds(work, device, runs)
        detail = {
            "bytes": size_bytes,
            "copy_bandwidth": bandwidth,
            "copy_fraction": size_bytes / ours / bandwidth,
        }
        note = "seconds, median; ratio is the inverse of the fraction of copy bandwidth"
        copy = size_bytes / bandwidth
        return Row(what, ours, copy, COPY, scenario, note, detail=detail, **more)

    sum_up = load(WEIGHTED_SUM, device)
    yield beside_a_copy("mean", lambda: sum_up(deltas_CD, weights_C), moved, most=GOAL)
    ours = seconds(lambda: sum_up(deltas_CD, weights_C), device, runs)
    theirs = seconds(lambda: combine(deltas_CD, weights_C), device, runs)
    yield Row("mean", ours, theirs, TORCH, scenario)
    methods = {method.name: method for method in BUILT_IN}
    for rule in FUSED:
        fused, by_torch = _fused_and_torch(methods[rule], deltas_CD, weights_C)
        yield beside_a_copy(rule, fused, moved, most=GOAL)
        ours, theirs = seconds(fused, device, runs), seconds(by_torch, device, min(runs, 3))
        yield Row(rule, ours, theirs, TORCH, scenario)
    yield beside_a_copy(
        "k-th magnitude",
        lambda: tensor_kth(deltas_CD, max(1, entries // 5)),
        clients * 4 * entries,
    )
    vectors = [TaskVector({"w": delta_D.view(side, side)}) for delta_D in deltas_CD]
    whole = partial(merge_task_vectors, vectors, Recipe(method="ties"))
    yield beside_a_copy("ties, checks and all", whole, moved)


def _fused_and_torch(
    method: MergeMethod, deltas_CD: Tensor, weights_C: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A method on all entries by its kernel and by torch, its statistics gathered beforehand."""
    assert method.kernel is not None
    assert method.merge is not None
    config, chunk = method.config(), Chunk("w", 0, 1, deltas_CD, True)
    found: dict[str, Tensor] = {}
    for statistic in method.statistics:
        assert statistic.count is not None
        count = statistic.count(config, deltas_CD.shape[1], found)
        found[statistic.name] = tensor_kth(deltas_CD, count)
    kernel, merge = load(method.kernel, deltas_CD.device), method.merge
    draws = method.draws

    def by_torch() -> Tensor:
        drawn = {draw.name: draw.make(chunk, config) for draw in draws}
        return merge(deltas_CD, weights_C, config, **found, **drawn)

    return partial(kernel, chunk, weights_C, config, **found), by_torch


def _ternary(device: torch.device, entries: int, updates: int, runs: int) -> Row:
    """Sparse updates that lie on the CPU, as they do when they arrive, beside decoding them."""
    found = [
        ternarise(torch.randn(entries, generator=torch.Generator().manual_seed(one)), 0.05)
        for one in range(updates)
    ]
    ones = [1.0] * updates
    sparse, dense = load(TERNARY_SUM, device), load(WEIGHTED_SUM, device)

    def decoded() -> object:
        return dense([update.dense().to(device) for update in found], ones)

    ours = seconds(lambda: sparse(found, ones, device), device, min(runs, 5))
    theirs = seconds(decoded, device, min(runs, 3))
    scenario = f"{updates} x {entries / 1e6:g}M ternary, 5 %"
    return Row("ternary mean", ours, theirs, "decode, copy over, dense kernel", scenario)


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """All rows on the current CUDA device."""
    side, runs, updates = (2048, 5, 8) if quick else (SIDE, RUNS, UPDATES)
    device = torch.device("cuda", torch.cuda.current_device())
    yield from rows(device, side, CLIENTS, updates, runs)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device: nothing was measured")
    main("gpu", measure)

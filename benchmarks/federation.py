"""The same federation by plain Flower (FedAvg, dense fp32, Ray) and by us, side by side.

Whole processes on both sides: from the command to its end, imports and loading included; Flower's
SuperLink is already up when its clock starts. Nobody evaluates while the clock runs; both adapters
are scored on the test data afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
from safetensors.torch import load_file

from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.baselines import score
from anabranch.simulation.engine.flower import run_in_flower
from anabranch.simulation.engine.threads import at_once
from anabranch.simulation.prepare import open_task, task_params
from anabranch.simulation.scenario import Scenario, load_scenario, write_scenario
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter
from benchmarks.harness import Row, main

ROOT = Path(__file__).parents[1]
FLOWER_DEFAULT_CPUS = 2
QUIET = {"local_only": False, "fedavg": False, "oracle": False}
TINY = {
    "name": "tiny-clients",
    "rounds": 10,
    "task": {
        "kind": "anabranch.simulation.synthetic:SyntheticTask",
        "clients": 100,
        "examples": 64,
    },
    "train": {"steps": 1, "batch_size": 16, "learning_rate": 0.01},
    # The rival's own algorithm, so that the engines alone differ.
    "recipe": {"method": "fedit"},
    "codec": {"name": "dense", "feedback": 0.0},
}


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        wall_s: The whole process, or for Flower from ``flwr run`` to finished.
        rounds_s: From the strategy's start to its end.
        busy_s: Σ seconds of the train calls.
        memory_bytes: Peak memory of all its processes.
        bytes_up: Mean size of one update.
        adapter: What it ended with.
    """

    wall_s: float
    rounds_s: float
    busy_s: float
    memory_bytes: float
    bytes_up: float
    adapter: Adapter

    def overhead(self, clients_at_once: int) -> float:
        """Share of the rounds' time in which no client trained."""
        return max(0.0, 1 - self.busy_s / clients_at_once / self.rounds_s)


def measured(work: Callable[[], None]) -> tuple[float, int]:
    """Wall seconds of a call, and the peak memory (Σ PSS) of the processes it starts."""
    peak, done = 0, threading.Event()
    me = psutil.Process()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            total = 0
            for child in _family(me):
                try:
                    total += child.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        work()
        return time.perf_counter() - started, peak
    finally:
        done.set()
        watcher.join()


def _family(me: psutil.Process) -> list[psutil.Process]:
    """Our children, and what Ray puts in sessions of its own."""
    mine = me.children(recursive=True)
    seen = {process.pid for process in mine}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = " ".join(process.info["cmdline"] or ())
        if (
            process.pid not in seen
            and process.info["create_time"] >= me.create_time()
            and ("ray::" in line or "/ray/" in line)
        ):
            mine.append(process)
    return mine


def ours(scenario: Scenario, engine: str, folder: Path) -> Run:
    """Our run, through the command line."""
    only = scenario.model_copy(update={"engine": engine, "evaluate_every": 0})
    path = folder / "scenario.toml"
    write_scenario(only, path)
    out = folder / "run"

    def work() -> None:
        arguments = [sys.executable, "-m", "benchmarks.our_federation", str(path), str(out)]
        subprocess.run(arguments, check=True, cwd=ROOT)

    wall_s, memory = measured(work)
    store = FolderStore(out)
    rows = store.contributions()
    journal = (out / "metrics.jsonl").read_text()
    times = {row["event"]: row["time"] for row in map(json.loads, journal.splitlines())}
    return Run(
        wall_s=wall_s,
        rounds_s=times["ended"] - times["begun"],
        busy_s=sum(row.metrics["train-seconds"] for row in rows),
        memory_bytes=memory,
        bytes_up=fmean(row.size_bytes for row in rows),
        adapter=read_adapter(out / ADAPTER_FOLDER),
    )


def plain(scenario: Scenario, folder: Path, template: Adapter, clients: int, cpus: int) -> Run:
    """Plain Flower's run, in Ray, with ``cpus`` processors a client."""
    path = folder / "scenario.toml"
    write_scenario(scenario, path)
    config: dict[str, Any] = {
        "task": scenario.task.kind,
        "task-params": task_params(scenario),
        "scenario": str(path),
        "seed": scenario.seed,
        "clients": clients,
        "rounds": scenario.rounds,
    }
    seconds: list[float] = []
    # Flower's processes import the rival's app from this tree, wherever they are started.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    def work() -> None:
        seconds.append(
            run_in_flower(
                folder,
                clients,
                config,
                server_app="benchmarks.plain_flower:server_app",
                client_app="benchmarks.plain_flower:client_app",
                cpus_per_client=cpus,
            )
        )

    _, memory = measured(work)
    lines = [line.split() for line in (folder / "fedavg.txt").read_text().splitlines()]
    (rounds_s, _), rounds = lines[0], lines[1:]
    return Run(
        wall_s=seconds[0],
        rounds_s=float(rounds_s),
        busy_s=sum(float(mean_s) for mean_s, _ in rounds) * clients,
        memory_bytes=memory,
        bytes_up=fmean(float(size) for _, size in rounds),
        adapter=template.with_tensors(load_file(folder / "fedavg.safetensors")),
    )


def compare(scenario: Scenario, label: str, runs: int) -> Iterator[Row]:
    """Every row of one scenario, medians over the runs."""
    session = open_task(scenario)
    task = session.task
    assert isinstance(task, SimulatedTask)
    clients, cores = task.num_partitions, os.cpu_count() or 1

    def accuracy(found: list[Run]) -> float:
        """Mean test accuracy over the groups; equal runs give equal adapters."""
        return fmean(row["accuracy"] for row in score(session, found[0].adapter)["test"].values())

    # The rival as it comes, and with a client on each core, which is faster for small models.
    settings = (FLOWER_DEFAULT_CPUS, 1)
    rivals: dict[int, list[Run]] = {cpus: [] for cpus in settings}
    mine: dict[str, list[Run]] = {"inprocess": [], "flower": []}
    for _ in range(runs):
        for cpus in settings:
            with tempfile.TemporaryDirectory() as folder:
                run = plain(scenario, Path(folder), session.template, clients, cpus)
                rivals[cpus].append(run)
        for engine, found in mine.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(ours(scenario, engine, Path(folder)))

    def middle(found: list[Run], field: str) -> float:
        return float(median(getattr(run, field) for run in found))

    notes = {
        "wall seconds": "whole process; the rival from 'flwr run' to finished",
        "round seconds": "from the strategy's start to its end",
        "overhead fraction": "share of the rounds' time, per client trained at once, not training",
        "bytes up": "mean bytes of one update",
        "accuracy": "mean test accuracy over groups",
        "peak memory": "bytes, proportional set size summed over all processes of the run",
    }
    for engine, found in mine.items():
        together = at_once(session, clients) if engine == "inprocess" else cores
        for cpus, other in rivals.items():
            default = " (its default)" if cpus == FLOWER_DEFAULT_CPUS else ""
            name = f"Flower 1.41 FedAvg, dense fp32, Ray, {cpus} cpu a client{default}"
            figures = {
                "wall seconds": (middle(found, "wall_s"), middle(other, "wall_s")),
                "round seconds": (middle(found, "rounds_s"), middle(other, "rounds_s")),
                "overhead fraction": (
                    median(run.overhead(together) for run in found),
                    median(run.overhead(max(1, cores // cpus)) for run in other),
                ),
                "bytes up": (middle(found, "bytes_up"), middle(other, "bytes_up")),
                "accuracy": (accuracy(found), accuracy(other)),
                "peak memory": (middle(found, "memory_bytes"), middle(other, "memory_bytes")),
            }
            for what, (us, them) in figures.items():
                yield Row(what, us, them, name, f"{label}, {engine}", notes[what])


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """Rows of the scenarios ``tiny`` and ``quickstart``; ``only`` may name one, or a row."""
    if only != "quickstart":
        tiny = Scenario.model_validate({**TINY, "baselines": QUIET, "evaluate_every": 0})
        yield from compare(tiny, "tiny: 100 clients, 1 step", 1 if quick else 3)
    if only != "tiny":
        scenario = load_scenario(ROOT / "examples" / "quickstart.toml")
        change: dict[str, Any] = {"baselines": scenario.baselines.model_copy(update=QUIET)}
        if quick:
            change["rounds"] = 1
        yield from compare(scenario.model_copy(update=change), "quickstart", 1)


if __name__ == "__main__":
    main("federation", measure)

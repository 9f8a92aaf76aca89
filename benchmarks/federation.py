"""The same federation by plain Flower (FedAvg, dense fp32, Ray) and by us, side by side.

Whole processes on both sides: from the command to its end, imports and loading included; Flower's
SuperLink is already up when its clock starts. Nobody evaluates while the clock runs; both adapters
are scored on the test data afterwards.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
from safetensors.torch import load_file

from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.baselines import score
from anabranch.simulation.engine.flower import run_in_flower
from anabranch.simulation.run import open_task, task_params
from anabranch.simulation.scenario import Scenario, load_scenario, write_scenario
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter
from benchmarks.harness import Row, main

ROOT = Path(__file__).parents[1]
QUIET = {"local_only": False, "fedavg": False, "oracle": False}
TINY = {
    "name": "tiny-clients",
    "rounds": 3,
    "task": {
        "kind": "anabranch.simulation.synthetic:SyntheticTask",
        "clients": 100,
        "examples": 64,
    },
    "train": {"steps": 1, "batch_size": 16, "learning_rate": 0.01},
    "recipe": {"method": "ties", "params": {"density": 0.2}},
}


class Run:
    """One measured run."""

    def __init__(
        self, wall_s: float, memory_bytes: int, busy_s: float, up: float, adapter: Adapter
    ) -> None:
        self.wall_s = wall_s
        self.memory_bytes = memory_bytes
        self.busy_s = busy_s
        self.bytes_up = up
        self.adapter = adapter


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
    code = (
        "import sys, json, pathlib\n"
        "from anabranch.simulation.run import open_folder, open_task, run_federation\n"
        "from anabranch.simulation.scenario import load_scenario\n"
        "scenario = load_scenario(pathlib.Path(sys.argv[1]))\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "session = open_task(scenario)\n"
        "open_folder(scenario, out, resume=False, overwrite=False)\n"
        "run_federation(scenario, out, session)\n"
    )

    def work() -> None:
        subprocess.run([sys.executable, "-c", code, str(path), str(out)], check=True, cwd=ROOT)

    wall_s, memory = measured(work)
    store = FolderStore(out)
    rows = store.notes("admitted")
    return Run(
        wall_s,
        memory,
        sum(row["metrics"]["train-seconds"] for row in rows),
        fmean(row["size_bytes"] for row in rows),
        read_adapter(out / ADAPTER_FOLDER),
    )


def round_seconds(folder: Path) -> float:
    """Seconds our rounds took, from the first order to the last merge."""
    return float(sum(row["seconds"] for row in FolderStore(folder / "run").notes("round")))


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
    rounds = [line.split() for line in (folder / "fedavg.txt").read_text().splitlines()]
    adapter = template.with_tensors(load_file(folder / "fedavg.safetensors"))
    busy = sum(float(seconds) for seconds, _ in rounds) * clients
    return Run(seconds[0], memory, busy, fmean(float(size) for _, size in rounds), adapter)


def compare(scenario: Scenario, label: str, runs: int) -> Iterator[Row]:
    """Every row of one scenario, medians over the runs."""
    session = open_task(scenario)
    task = session.task
    assert isinstance(task, SimulatedTask)
    clients = task.num_partitions

    def accuracy(adapter: Adapter) -> float:
        return fmean(row["accuracy"] for row in score(session, adapter)["test"].values())

    mine: dict[str, list[Run]] = {"inprocess": [], "flower": []}
    rivals: dict[int, list[Run]] = {2: [], 1: []}
    overheads: dict[str, list[float]] = {"inprocess": [], "flower": []}
    for _ in range(runs):
        for cpus, found in rivals.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(plain(scenario, Path(folder), session.template, clients, cpus))
        for engine, found in mine.items():
            with tempfile.TemporaryDirectory() as folder:
                run = ours(scenario, engine, Path(folder))
                found.append(run)
                spent = round_seconds(Path(folder))
                overheads[engine].append(max(0.0, spent - run.busy_s) / spent)

    def middle(found: list[Run], field: str) -> float:
        return float(median(getattr(run, field) for run in found))

    # The rival gets its better setting: one client at a time on two cores, or two on one each.
    best = min(rivals, key=lambda cpus: middle(rivals[cpus], "wall_s"))
    name = f"Flower 1.41 FedAvg dense fp32, Ray, {best} cpu a client"
    other = rivals[best]
    for engine, found in mine.items():
        where = f"{label}, {engine}"
        yield Row(
            "wall seconds", middle(found, "wall_s"), middle(other, "wall_s"), name, where,
            "whole process; rival from 'flwr run' to finished; rival's other setting took "
            f"{middle(rivals[3 - best], 'wall_s'):.1f} s",
        )  # fmt: skip
        idle = median(1 - run.busy_s / (run.wall_s * (2 if best == 1 else 1)) for run in other)
        yield Row(
            "overhead fraction", median(overheads[engine]), max(0.0, idle), name, where,
            "ours: rounds' wall beyond train calls; rival: run's wall beyond them",
        )  # fmt: skip
        yield Row(
            "bytes up", middle(found, "bytes_up"), middle(other, "bytes_up"), name, where,
            "mean bytes of one update",
        )  # fmt: skip
        yield Row(
            "accuracy", accuracy(found[0].adapter), accuracy(other[0].adapter), name, where,
            "mean test accuracy over groups",
        )  # fmt: skip
        yield Row(
            "peak memory", middle(found, "memory_bytes"), middle(other, "memory_bytes"), name,
            where, "bytes, PSS summed over all processes of the run",
        )  # fmt: skip


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """Rows of both scenarios: ``quickstart`` and ``tiny``."""
    if only in (None, "tiny"):
        tiny = Scenario.model_validate({**TINY, "baselines": QUIET, "evaluate_every": 0})
        yield from compare(tiny, "tiny: 100 clients, 1 step", 1 if quick else 3)
    if only in (None, "quickstart"):
        scenario = load_scenario(ROOT / "examples" / "quickstart.toml")
        change: dict[str, Any] = {"baselines": scenario.baselines.model_copy(update=QUIET)}
        if quick:
            change["rounds"] = 1
        yield from compare(scenario.model_copy(update=change), "quickstart", 1)


if __name__ == "__main__":
    main("federation", measure)

"""Simulate a scenario from end to end: federation, baselines, test scores, summary, report.

A run lives in one folder and can be interrupted at any time: rounds and baselines that are finished
are read back, the rest is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anabranch.aggregation import resolve
from anabranch.aggregation.recipe import Recipe
from anabranch.client.app import app as client_app
from anabranch.client.session import Session, open_session
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.app import app as server_app
from anabranch.coordinator.federation import FEDERATION_FILE, START_FOLDER, write_federation
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.store.folder import ARTIFACTS, JOURNAL
from anabranch.simulation.baselines import Scores, oracle, score, train_alone
from anabranch.simulation.engine.flower import run_in_flower
from anabranch.simulation.engine.inprocess import run_in_process
from anabranch.simulation.report import write_report
from anabranch.simulation.scenario import Baselines, Scenario, load_scenario, write_scenario
from anabranch.simulation.summary import Measured, summarise
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import seeded_start
from anabranch.vectors.peft_folder import read_adapter, write_adapter
from anabranch.wire.config import CodecConfig

CONFIG_FILE, SUMMARY_FILE, REPORT_FILE, SCORES_FILE = (
    "config.toml",
    "summary.json",
    "report.html",
    "scores.json",
)
FEDAVG_FOLDER = "fedavg"
RUN_NAMES = frozenset(
    {
        CONFIG_FILE, SUMMARY_FILE, REPORT_FILE, SCORES_FILE, FEDAVG_FOLDER, ADAPTER_FOLDER,
        START_FOLDER, FEDERATION_FILE, JOURNAL, ARTIFACTS, "flower",
        f"{ADAPTER_FOLDER}.new", f"{ADAPTER_FOLDER}.old", "scores.partial",
    }
)  # fmt: skip
"""Every name a run writes into its folder."""

Progress = Callable[[str, int, int], None]
"""``progress(phase, done, total)``."""


def _silent(phase: str, done: int, total: int) -> None:
    """No progress shown."""


def open_folder(scenario: Scenario, folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Make a run's folder, or check that a run in it may be gone on with.

    Returns:
        Whether an earlier run is gone on with.

    Raises:
        ValueError: The folder holds something else, or another scenario's run.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; give one of them")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a new folder with --out")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if held:
        foreign = [name for name in held if name not in RUN_NAMES]
        if foreign or CONFIG_FILE not in held:
            odd = foreign[0] if foreign else held[0]
            raise ValueError(
                f"{folder}: holds {odd!r}, which no run wrote; name a new folder with --out"
            )
        if overwrite:
            _delete_run(folder, held)
        elif not resume:
            raise ValueError(f"{folder}: already holds a run; give --resume, --overwrite or --out")
        elif load_scenario(folder / CONFIG_FILE) != scenario:
            raise ValueError(
                f"{folder}: holds a run of another scenario than this; use --overwrite"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made ({error.strerror}); name another") from error
    write_scenario(scenario, folder / CONFIG_FILE)
    return bool(held) and resume


def _delete_run(folder: Path, names: list[str]) -> None:
    """Delete what a run wrote, and nothing else."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def open_task(scenario: Scenario) -> Session:
    """Load the scenario's task and base.

    Raises:
        ValueError: It cannot be simulated, or its parameters are wrong.
    """
    session = open_session(scenario.task.kind, task_params(scenario))
    if not isinstance(session.task, SimulatedTask):
        raise ValueError(
            f"task.kind: {scenario.task.kind} cannot be simulated; "
            "it lacks what anabranch.simulation.task.SimulatedTask names"
        )
    return session


def task_params(scenario: Scenario) -> str:
    """The task's parameters as every process of the run is given them.

    Raises:
        ValueError: One is a date or another value that JSON does not hold.
    """
    try:
        return json.dumps(scenario.task.params(), sort_keys=True)
    except TypeError as error:
        raise ValueError(f"task: {error}; use text, numbers, lists and tables") from error


def check(scenario: Scenario, task: SimulatedTask) -> None:
    """Find what would go wrong later, before anything is written.

    Raises:
        ValueError: The recipe, the quorum or the data cannot work; names the key.
    """
    config = scenario.federation(task.num_partitions)
    method, parameters = resolve(scenario.recipe)
    asked = max(1, round(config.fraction * config.clients))
    for count in (config.quorum, asked):
        try:
            method(torch.ones(count, 4), None, parameters)
        except ValueError as error:
            between = f"a round merges {config.quorum} to {asked} updates"
            raise ValueError(f"recipe: {error} ({between})") from error
    task.check_data()


def run_federation(
    scenario: Scenario, folder: Path, session: Session, progress: Progress = _silent
) -> None:
    """Run the scenario's federation in a folder, by its engine.

    Args:
        scenario: What to run.
        folder: Gets ``federation.toml``, ``start/``, the journal, and ``adapter/`` at the end.
        session: The loaded task.
        progress: Told of every client that has trained or evaluated.
    """
    task = session.task
    assert isinstance(task, SimulatedTask)
    config = scenario.federation(task.num_partitions)
    write_federation(config, folder)
    if not (folder / START_FOLDER).exists():
        write_adapter(seeded_start(session.template, scenario.seed), folder / START_FOLDER)
    if (folder / ADAPTER_FOLDER).exists():
        return
    asked = max(1, round(config.fraction * config.clients))
    total = config.rounds * asked
    if config.evaluate_every:
        total += (config.rounds // config.evaluate_every) * config.clients
    store = FolderStore(folder)
    done = len(store.notes("admitted")) + len(store.notes("evaluate"))
    run_config: dict[str, bool | int | float | str] = {
        "task": scenario.task.kind,
        "task-params": task_params(scenario),
    }

    def one_more(kind: str, partition: int) -> None:
        nonlocal done
        if kind != "query":
            done += 1
            progress("federation", done, total)

    def look() -> None:
        rows = FolderStore(folder)
        seen = len(rows.notes("admitted")) + len(rows.notes("evaluate"))
        progress("federation", seen, total)

    progress("federation", done, total)
    if scenario.engine == "flower":
        run_in_flower(folder, config.clients, run_config, on_poll=look)
    else:
        run_in_process(server_app, client_app, folder, config.clients, run_config, one_more)


def fedavg_of(scenario: Scenario) -> Scenario:
    """The same federation averaging dense factors in fp32: FedIT, what FedAvg does to LoRA."""
    return scenario.model_copy(
        update={
            "engine": "inprocess",
            "down": "fp32",
            "max_norm": None,
            "recipe": Recipe(method="fedit"),
            "codec": CodecConfig(name="dense", feedback=0.0),
            "evaluate_every": 0,
            "baselines": Baselines(local_only=False, fedavg=False, oracle=False),
        }
    )


def simulate(
    scenario: Scenario,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Run a scenario and everything it is compared with.

    Args:
        scenario: What to run.
        folder: Where results go: ``metrics.jsonl``, ``config.toml``, ``adapter/``,
            ``summary.json``, ``report.html``.
        resume: Go on with a run that was interrupted.
        overwrite: Delete a finished run of the same folder first.
        progress: Told of every step.

    Returns:
        The summary, as ``summary.json`` holds it.

    Raises:
        ValueError: The scenario or the folder cannot be used.
        RuntimeError: No round could be merged; summary and report are there all the same.
    """
    began = time.perf_counter()
    session = open_task(scenario)
    task = session.task
    assert isinstance(task, SimulatedTask)
    check(scenario, task)
    resumed = open_folder(scenario, folder, resume=resume, overwrite=overwrite)
    seconds = _Phases(folder / SCORES_FILE)
    wanted = scenario.baselines

    with seconds.phase("federation"):
        run_federation(scenario, folder, session, progress)
    merged = read_adapter(folder / ADAPTER_FOLDER)
    start = read_adapter(folder / START_FOLDER)
    scores = seconds.scores
    if "merged" not in scores:
        with seconds.phase("scores"):
            scores["base"] = score(session, start, progress)
            scores["merged"] = score(session, merged, progress)
    if wanted.fedavg and "fedavg" not in scores:
        with seconds.phase("fedavg"):
            run_federation(fedavg_of(scenario), folder / FEDAVG_FOLDER, session, _renamed(progress))
            adapter = read_adapter(folder / FEDAVG_FOLDER / ADAPTER_FOLDER)
            scores["fedavg"] = score(session, adapter, progress)
    if wanted.oracle and "oracle" not in scores:
        with seconds.phase("oracle"):
            progress("oracle", 0, 1)
            scores["oracle"] = score(session, oracle(scenario, session, start), progress)
            progress("oracle", 1, 1)
    if wanted.local_only:
        for partition in range(task.num_partitions):
            key = f"local-{partition}"
            progress("local-only", partition, task.num_partitions)
            if key not in scores:
                with seconds.phase("local-only"):
                    adapter = train_alone(scenario, session, start, partition)
                    scores[key] = score(session, adapter)
        progress("local-only", task.num_partitions, task.num_partitions)
    seconds.save()

    measured = Measured(
        store=FolderStore(folder),
        scores=scores,
        groups=list(task.groups),
        scored=dict(task.scored_partitions),
        adapter=merged,
        phases=seconds.phases,
    )
    summary = summarise(scenario, measured, total_s=time.perf_counter() - began)
    summary["resumed"] = resumed
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    write_report(summary, measured, folder / REPORT_FILE)
    if measured.store.latest() is None:
        refusals = measured.store.refusals()
        why = f"; first refusal: {refusals[0].reason}" if refusals else ""
        raise RuntimeError(f"{folder}: no round reached its quorum, nothing was merged{why}")
    return summary


def _renamed(progress: Progress) -> Progress:
    return lambda phase, done, total: progress("FedAvg baseline", done, total)


class _Phases:
    """Seconds per phase and scores per adapter, kept in a file so that a run can go on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        held = json.loads(path.read_text()) if path.exists() else {}
        self.phases: dict[str, float] = held.get("phases", {})
        self.scores: dict[str, Scores] = held.get("scores", {})

    def phase(self, name: str) -> _Timer:
        return _Timer(self, name)

    def save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"phases": self.phases, "scores": self.scores}, indent=2))
        partial.replace(self._path)


class _Timer:
    def __init__(self, phases: _Phases, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        spent = self._phases.phases.get(self._name, 0.0) + time.perf_counter() - self._began
        self._phases.phases[self._name] = spent
        self._phases.save()

"""Simulate a scenario from end to end: federation, baselines, test scores, summary, report.

A run lives in one folder and can be interrupted at any time: rounds and baselines that are finished
are read back, the rest is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import named
from anabranch.client.app import app as client_app
from anabranch.client.session import Session, client_name, open_session
from anabranch.client.task import FisherTask
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.app import app as server_app
from anabranch.coordinator.federation import START_FOLDER, write_federation
from anabranch.coordinator.flower import CLIENT_APP
from anabranch.coordinator.merging import check_method
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.attacks.app import ATTACKERS_KEY
from anabranch.simulation.attacks.app import app as attacked_app
from anabranch.simulation.attacks.kinds import resolve_kind
from anabranch.simulation.attacks.success import success_rates, victims
from anabranch.simulation.baselines import Scores, oracle, score, train_alone
from anabranch.simulation.engine.flower import run_in_flower
from anabranch.simulation.engine.inprocess import run_in_process
from anabranch.simulation.engine.threads import ClientThreads, at_once
from anabranch.simulation.folder import (
    FEDAVG_FOLDER,
    REPORT_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
    UNATTACKED_FOLDER,
    UNDEFENDED_FOLDER,
    open_folder,
)
from anabranch.simulation.keys import write_keys
from anabranch.simulation.scenario import Baselines, Scenario
from anabranch.simulation.summary import Measured, summarise
from anabranch.simulation.task import SimulatedTask
from anabranch.simulation.validation import write_task
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.peft_folder import read_adapter, write_adapter
from anabranch.wire.config import CodecConfig

NO_BASELINES = Baselines(
    local_only=False, fedavg=False, oracle=False, unattacked=False, undefended=False
)
ATTACKED_APP = "anabranch.simulation.attacks.app:app"

Progress = Callable[[str, int, int], None]
"""``progress(phase, done, total)``."""


def _silent(phase: str, done: int, total: int) -> None:
    """No progress shown."""


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
    """The task's parameters as every process of the run is given them."""
    return json.dumps(scenario.task.params(), sort_keys=True)


def prepare(scenario: Scenario) -> Session:
    """Load the scenario's task, and find before anything is written what would go wrong later.

    Raises:
        ValueError: The task, recipe, quorum or data cannot work; names the key.
    """
    session = open_task(scenario)
    assert isinstance(session.task, SimulatedTask)
    config = scenario.federation(session.task.num_partitions)
    merged = [config.quorum, scenario.asked(config.clients)]
    if config.secure is not None:
        merged = [config.secure.contributions(count) for count in merged]
    _check_recipe(config.recipe, session.template, *merged)
    method = named(config.recipe)
    if method.needs_importance and not isinstance(session.task, FisherTask):
        raise ValueError(
            f"recipe: {method.name} needs the clients' Fisher, and task.kind "
            f"{scenario.task.kind} has no method 'logits'; see anabranch.client.task.FisherTask"
        )
    check_method(config, session.template, method)
    names = [client_name(partition) for partition in range(config.clients)]
    if strangers := [client for client in config.ranks if client not in names]:
        raise ValueError(
            f"ranks.{strangers[0]}: there is no such client; they are {names[0]} to {names[-1]}"
        )
    session.task.check_data()
    if scenario.attackers:
        _check_attackers(scenario, session)
    return session


def _check_attackers(scenario: Scenario, session: Session) -> None:
    """Find before anything is written what would keep attackers from attacking."""
    task = session.task
    assert isinstance(task, SimulatedTask)
    for index, attackers in enumerate(scenario.attackers):
        kind, _ = resolve_kind(attackers, f"attackers.{index}")
        if kind.tamper is not None and scenario.secure is not None:
            raise ValueError(
                f"attackers.{index}.kind: {kind.name} rewrites an encoded update, and secure "
                "aggregation sends masked ones; leave secure out, or choose another kind"
            )
    victims(session, scenario.plot(task.num_partitions))


def _check_recipe(recipe: Recipe, template: Adapter, quorum: int, asked: int) -> None:
    """Try the recipe on as few and on as many updates as a round may merge."""
    generator = torch.Generator().manual_seed(0)
    for count in sorted({quorum, asked}):
        try:
            parts = groups(recipe, [*template.lora, *template.dense], count)
        except ValueError as error:
            raise ValueError(f"recipe.{str(error).removeprefix('recipe: ')}") from error
        for group in parts:
            try:
                # Matrices, and not vectors: of those a method on matrices takes the mean.
                group.method(torch.randn(count, 4, 4, generator=generator), config=group.config)
            except ValueError as error:
                raise ValueError(
                    f"recipe: a round merges {quorum} (quorum) to {asked} updates, which "
                    f"{group.method.name} cannot: {error}"
                ) from error


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
    if config.gate is not None:
        write_task(scenario.task.kind, task_params(scenario), folder)
    keys = write_keys(folder, config) if config.signed else None
    total = config.rounds * scenario.asked(config.clients)
    if config.evaluate_every:
        total += (config.rounds // config.evaluate_every) * config.clients
    store = FolderStore(folder)
    done = len(store.contributions()) + len(store.notes("evaluate"))
    run_config: dict[str, bool | int | float | str] = {
        "task": scenario.task.kind,
        "task-params": task_params(scenario),
    }
    if scenario.attackers:
        run_config[ATTACKERS_KEY] = scenario.plot(config.clients).model_dump_json()

    def one_more(kind: str, partition: int) -> None:
        nonlocal done
        if kind != "query":
            done += 1
            progress("federation", done, total)

    def look() -> None:
        rows = FolderStore(folder)
        seen = len(rows.contributions()) + len(rows.notes("evaluate"))
        progress("federation", seen, total)

    progress("federation", done, total)
    if scenario.engine == "flower":
        named_app = ATTACKED_APP if scenario.attackers else CLIENT_APP
        run_in_flower(
            folder, config.clients, run_config, client_app=named_app, keys=keys, on_poll=look
        )
    else:
        run_in_process(
            server_app,
            attacked_app if scenario.attackers else client_app,
            folder,
            config.clients,
            run_config,
            one_more,
            at_once(session, scenario.asked(config.clients)),
            keys,
        )


def fedavg_of(scenario: Scenario) -> Scenario:
    """The same federation averaging dense factors in fp32: FedIT, what FedAvg does to LoRA."""
    return scenario.model_copy(
        update={
            "engine": "inprocess",
            "down": "fp32",
            "max_norm": None,
            "signed": False,
            "secure": None,
            "trains": "both",
            "ranks": {},
            "rest": "drop",
            "recipe": Recipe(method="fedit"),
            "codec": CodecConfig(name="dense", feedback=0.0),
            "evaluate_every": 0,
            "baselines": NO_BASELINES,
        }
    )


def unattacked_of(scenario: Scenario) -> Scenario:
    """The same federation with everybody honest: what the attack cost."""
    return scenario.model_copy(
        update={"attackers": (), "evaluate_every": 0, "baselines": NO_BASELINES}
    )


def undefended_of(scenario: Scenario) -> Scenario:
    """The same federation and attack where nothing defends: a plain mean of ΔW."""
    update: dict[str, Any] = {
        "recipe": Recipe(method="mean", refactor=scenario.recipe.refactor),
        "gate": None,
        "max_norm": None,
        "privacy": None,
        "evaluate_every": 0,
        "baselines": NO_BASELINES,
    }
    if scenario.codec.name == "ranks":
        # Ranks are votes; a mean takes sizes.
        update["codec"] = CodecConfig(name="dense", feedback=0.0)
    return scenario.model_copy(update=update)


def has_defence(scenario: Scenario) -> bool:
    """Whether a scenario merges by more than the plain mean it would be compared with."""
    bare = undefended_of(scenario)
    return any(
        getattr(scenario, name) != getattr(bare, name)
        for name in ("recipe", "gate", "max_norm", "privacy")
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
    session = prepare(scenario)
    task = session.task
    assert isinstance(task, SimulatedTask)
    resumed = open_folder(scenario, folder, resume=resume, overwrite=overwrite)
    seconds = _Phases(folder / SCORES_FILE)
    with seconds.phase("federation"):
        run_federation(scenario, folder, session, progress)
    # What kept every round from its quorum would keep the baselines from training.
    published = FolderStore(folder).latest() is not None
    wanted = scenario.baselines if published else NO_BASELINES
    merged = read_adapter(folder / ADAPTER_FOLDER)
    start = read_adapter(folder / START_FOLDER)
    scores = seconds.scores
    plot = scenario.plot(task.num_partitions)

    def scored(adapter: Adapter) -> Scores:
        found = score(session, adapter, progress)
        return {**found, **success_rates(session, plot)}

    if "merged" not in scores:
        with seconds.phase("scores"):
            scores["base"] = scored(start)
            scores["merged"] = scored(merged)
    others = {
        "fedavg": (wanted.fedavg, fedavg_of, FEDAVG_FOLDER, "FedAvg baseline"),
        "unattacked": (
            wanted.unattacked and bool(plot.bands), unattacked_of, UNATTACKED_FOLDER, "unattacked",
        ),
        "undefended": (
            wanted.undefended and bool(plot.bands) and has_defence(scenario),
            undefended_of, UNDEFENDED_FOLDER, "undefended",
        ),
    }  # fmt: skip
    for name, (asked, other_of, inner, phase) in others.items():
        if asked and name not in scores:
            with seconds.phase(name):
                other = other_of(scenario)
                run_federation(other, folder / inner, session, _renamed(progress, phase))
                scores[name] = scored(read_adapter(folder / inner / ADAPTER_FOLDER))
    if wanted.oracle and "oracle" not in scores:
        with seconds.phase("oracle"):
            progress("oracle", 0, 1)
            scores["oracle"] = scored(oracle(scenario, session, start))
            progress("oracle", 1, 1)
    if wanted.local_only:
        _score_alone(scenario, session, start, seconds, progress)
    seconds.save()

    measured = Measured(
        store=FolderStore(folder),
        scores=scores,
        groups=list(task.groups),
        scored=dict(task.scored_partitions),
        start=start,
        phases=seconds.phases,
    )
    summary = summarise(scenario, measured, total_s=time.perf_counter() - began)
    summary["resumed"] = resumed
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    from anabranch.simulation.report import write_report  # charts take a second to load

    write_report(summary, measured, folder / REPORT_FILE)
    if not published:
        rounds, refusals = measured.store.notes("round"), measured.store.refusals()
        why = rounds[0].get("reason", "") if rounds else ""
        if refusals:
            why += f"; first refusal: {refusals[0].client}: {refusals[0].reason}"
        raise RuntimeError(f"{folder}: nothing was merged: {why}; report.html there has the rest")
    return summary


def _score_alone(
    scenario: Scenario, session: Session, start: Adapter, seconds: _Phases, progress: Progress
) -> None:
    """Train and score every client alone, as many at once as the federation's rounds."""
    task = session.task
    assert isinstance(task, SimulatedTask)
    total = task.num_partitions
    missing = [client for client in range(total) if f"local-{client}" not in seconds.scores]

    def alone(client: int) -> Scores:
        mine = open_task(scenario)  # this thread's
        own = [task.groups[client]]
        return score(mine, train_alone(scenario, mine, start, client), validated=own)

    with ClientThreads(at_once(session, total)) as threads:
        begun = {client: threads.begin(partial(alone, client)) for client in missing}
        for done, (client, result) in enumerate(begun.items(), start=total - len(missing)):
            progress("local-only", done, total)
            with seconds.phase("local-only"):
                seconds.scores[f"local-{client}"] = result()
    progress("local-only", total, total)


def _renamed(progress: Progress, name: str) -> Progress:
    return lambda phase, done, total: progress(name, done, total)


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

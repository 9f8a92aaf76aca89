"""Simulate a scenario from end to end: federation, baselines, test scores, summary, report.

A run lives in one folder and can be interrupted at any time: rounds and baselines that are finished
are read back, the rest is done.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from anabranch.client.session import Session
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.federation import START_FOLDER
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.attacks.success import success_rates
from anabranch.simulation.baselines import (
    NO_BASELINES,
    Scores,
    fedavg_of,
    has_defence,
    oracle,
    score,
    train_alone,
    unattacked_of,
    undefended_of,
)
from anabranch.simulation.engine.threads import ClientThreads, at_once
from anabranch.simulation.federation import Progress, run_federation, silent
from anabranch.simulation.folder import (
    FEDAVG_FOLDER,
    REPORT_FILE,
    SCORES_FILE,
    SUMMARY_FILE,
    UNATTACKED_FOLDER,
    UNDEFENDED_FOLDER,
    open_folder,
)
from anabranch.simulation.phases import Phases
from anabranch.simulation.prepare import open_task, prepare
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.summary import Measured, summarise
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter


def simulate(
    scenario: Scenario,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run a scenario and everything it is compared with.

    Args:
        scenario: What to run.
        folder: Where results go: ``metrics.jsonl``, ``config.toml``, ``adapter/``,
            ``summary.json``, ``report.html``.
        resume: Go on with a run that was interrupted.
        overwrite: Delete a finished run of the same folder first.
        report: Draw ``report.html`` too, which takes longer than a tiny federation.
        progress: Told of every step.

    Returns:
        The summary, as ``summary.json`` holds it.

    Raises:
        ValueError: The scenario or the folder cannot be used.
        RuntimeError: No round could be merged; what was asked for is written all the same.
    """
    began = time.perf_counter()
    session = prepare(scenario)
    task = session.task
    assert isinstance(task, SimulatedTask)
    resumed = open_folder(scenario, folder, resume=resume, overwrite=overwrite)
    seconds = Phases(folder / SCORES_FILE)
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
    if report:
        from anabranch.simulation.report import write_report  # charts take a second to load

        write_report(summary, measured, folder / REPORT_FILE)
    if not published:
        rounds, refusals = measured.store.notes("round"), measured.store.refusals()
        why = rounds[0].get("reason", "") if rounds else ""
        if refusals:
            why += f"; first refusal: {refusals[0].client}: {refusals[0].reason}"
        rest = REPORT_FILE if report else SUMMARY_FILE
        raise RuntimeError(f"{folder}: nothing was merged: {why}; {rest} there has the rest")
    return summary


def _score_alone(
    scenario: Scenario, session: Session, start: Adapter, seconds: Phases, progress: Progress
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

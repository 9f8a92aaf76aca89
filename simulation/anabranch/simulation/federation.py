"""Run a scenario's federation in a folder, by its engine; one that was interrupted goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anabranch.client.app import app as client_app
from anabranch.client.session import Session
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.app import app as server_app
from anabranch.coordinator.federation import START_FOLDER, write_federation
from anabranch.coordinator.flower import CLIENT_APP
from anabranch.coordinator.store import FolderStore
from anabranch.simulation.attacks.app import ATTACKERS_KEY
from anabranch.simulation.attacks.app import app as attacked_app
from anabranch.simulation.engine.flower import run_in_flower
from anabranch.simulation.engine.inprocess import run_in_process
from anabranch.simulation.engine.threads import at_once
from anabranch.simulation.keys import write_keys
from anabranch.simulation.prepare import task_params
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.task import SimulatedTask
from anabranch.simulation.validation import write_task
from anabranch.vectors import seeded_start
from anabranch.vectors.peft_folder import write_adapter

ATTACKED_APP = "anabranch.simulation.attacks.app:app"

Progress = Callable[[str, int, int], None]
"""``progress(phase, done, total)``."""


def silent(phase: str, done: int, total: int) -> None:
    """No progress shown."""


def run_federation(
    scenario: Scenario, folder: Path, session: Session, progress: Progress = silent
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

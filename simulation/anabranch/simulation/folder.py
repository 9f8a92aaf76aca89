"""A run's folder: what a run writes there, and when it may be gone on with or deleted."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.coordinator.federation import FEDERATION_FILE, START_FOLDER
from anabranch.coordinator.registry import KEYS_FOLDER
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.store.folder import ARTIFACTS, JOURNAL
from anabranch.coordinator.supervision.lease import LEASE_FILE, LOCK_FILE
from anabranch.simulation.scenario import Scenario, load_scenario, write_scenario
from anabranch.simulation.validation import TASK_FILE

CONFIG_FILE, SUMMARY_FILE, REPORT_FILE, SCORES_FILE = (
    "config.toml",
    "summary.json",
    "report.html",
    "scores.json",
)
FEDAVG_FOLDER, UNATTACKED_FOLDER, UNDEFENDED_FOLDER = "fedavg", "unattacked", "undefended"
RUN_NAMES = frozenset(
    {
        CONFIG_FILE, SUMMARY_FILE, REPORT_FILE, SCORES_FILE, FEDAVG_FOLDER, ADAPTER_FOLDER,
        UNATTACKED_FOLDER, UNDEFENDED_FOLDER, START_FOLDER, FEDERATION_FILE, KEYS_FOLDER, JOURNAL,
        ARTIFACTS, TASK_FILE, LEASE_FILE, LOCK_FILE, "flower",
        f"{ADAPTER_FOLDER}.new", f"{ADAPTER_FOLDER}.old", "scores.partial",
    }
)  # fmt: skip
"""Every name a run writes into its folder."""


def open_folder(scenario: Scenario, folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Make a run's folder, or check that a run in it may be gone on with.

    Returns:
        Whether an earlier run is gone on with.

    Raises:
        ValueError: The folder holds something else, another scenario's run or a damaged one, or
            cannot be made.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; give one of them")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"{folder}: {above} is no folder one may write to; name another with --out"
        )
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    begun = False
    if held:
        earlier = _scenario_of(folder, held)
        if overwrite:
            _delete_run(folder, held)
        elif not resume:
            raise ValueError(f"{folder}: already holds a run; give --resume, --overwrite or --out")
        elif earlier != scenario:
            raise ValueError(
                f"{folder}: holds a run of another scenario than this; use --overwrite"
            )
        else:
            begun = _has_begun(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_scenario(scenario, folder / CONFIG_FILE)
    return begun


def _scenario_of(folder: Path, names: list[str]) -> Scenario:
    """The scenario whose run lies in a folder. A file called config.toml alone makes no run."""
    odd = next((name for name in names if not _is_ours(name)), names[0])
    if {CONFIG_FILE, FEDERATION_FILE} <= set(names):
        try:
            return load_scenario(folder / CONFIG_FILE)
        except ValueError:
            odd = CONFIG_FILE
    raise ValueError(f"{folder}: holds {odd!r}, which no run wrote; name a new folder with --out")


def _is_ours(name: str) -> bool:
    """Whether a run writes such a name; a killed one leaves adapters under temporary names."""
    return name in RUN_NAMES or bool(re.fullmatch(r"\.(start|adapter\.new)\.[0-9a-f]{8}", name))


def _delete_run(folder: Path, names: list[str]) -> None:
    """Delete what a run wrote; with anything else in the folder, nothing at all."""
    for name in names:
        if not _is_ours(name):
            raise ValueError(
                f"{folder}: holds {name!r}, which no run wrote; move it away, or name a new folder"
            )
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _has_begun(folder: Path) -> bool:
    """Whether a run's journal holds anything; what its rows name must be there to go on."""
    try:
        for part in (folder, folder / FEDAVG_FOLDER, folder / UNATTACKED_FOLDER):
            store = FolderStore(part)
            digests = [row.digest for row in store.contributions()]
            for digest in digests + [row.digest for row in store.publications()]:
                store.get(digest)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}: cannot be gone on with: {error.args[0]}; restore it, or use --overwrite"
        ) from error
    journal = folder / JOURNAL
    return journal.exists() and journal.stat().st_size > 0

"""Who runs a federation's rounds right now: a lock that dies with its process, and how it ended.

The kernel lets go of the lock however its holder dies, so that whoever watches knows at once, and
two processes never run the rounds of one folder. Loads no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

LOCK_FILE = "serverapp.lock"
LEASE_FILE = "serverapp.json"
UP_LOCK = "up.lock"
"""Held by who supervises: a federation, or a folder of them."""

PATIENCE_S = 5.0
"""Seconds to wait for a holder that is about to end."""
GLANCE_S = 0.5
"""Seconds to wait for somebody who only looks whether it is held."""


@dataclass(frozen=True)
class Lease:
    """What is known of the process that runs the rounds, or did.

    Attributes:
        run: Flower's number of its run.
        pid: Its process.
        since_s: When it began, in Unix seconds.
        ended: ``done``, or why it ended; None while it runs, and where it was killed.
    """

    run: str
    pid: int
    since_s: float
    ended: str | None = None


class HeldError(RuntimeError):
    """Another process runs this folder's rounds."""


@contextmanager
def held(folder: Path, run: str) -> Iterator[None]:
    """Run a federation's rounds in this block, alone; how it ends is written down.

    Args:
        folder: The federation's.
        run: Flower's number of the run.

    Raises:
        HeldError: Another process runs them.
    """
    with (folder / LOCK_FILE).open("a") as file:
        _lock(file, folder)
        lease = Lease(run, os.getpid(), time.time())
        _write(folder, lease)
        try:
            yield
        except BaseException as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            _write(folder, Lease(lease.run, lease.pid, lease.since_s, reason))
            raise
        _write(folder, Lease(lease.run, lease.pid, lease.since_s, "done"))


def look(folder: Path) -> tuple[Lease | None, bool]:
    """The last lease there was, and whether its holder lives."""
    try:
        with (folder / LOCK_FILE).open() as file:
            alive = not _free(file)
        # Not before: who ends writes how, and then lets go.
        lease = Lease(**json.loads((folder / LEASE_FILE).read_text()))
    except FileNotFoundError:
        return None, False
    return lease, alive


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only one that supervises a folder.

    Raises:
        ValueError: Another one does.
    """
    with (folder / UP_LOCK).open("a") as file:
        if not _locked(file, GLANCE_S):
            raise ValueError(f"{folder}: another `coordinator up` works on it; stop that one first")
        yield


def supervised(folder: Path) -> bool:
    """Whether somebody supervises a folder right now."""
    try:
        with (folder / UP_LOCK).open() as file:
            return not _free(file)
    except FileNotFoundError:
        return False


def _free(file: IO[str]) -> bool:
    """Whether nobody holds the lock; a shared look does not keep another one out."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(file: IO[str], folder: Path) -> None:
    if not _locked(file, PATIENCE_S):
        holder, _ = look(folder)
        who = f"process {holder.pid}, Flower run {holder.run}" if holder else "another process"
        raise HeldError(
            f"{folder}: {who} runs these rounds already; stop it, or wait until it ends"
        )


def _locked(file: IO[str], patience_s: float) -> bool:
    """Take a lock; False where somebody holds it for so long."""
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        else:
            return True


def _write(folder: Path, lease: Lease) -> None:
    partial = folder / f"{LEASE_FILE}.partial"
    partial.write_text(json.dumps(asdict(lease)))
    partial.replace(folder / LEASE_FILE)

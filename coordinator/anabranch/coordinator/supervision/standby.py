"""One process that waits to become the next ServerApp, since loading one takes seconds.

Flower starts its ServerApp by name: the folder of a standby, first in the SuperLink's ``PATH``, has
a command of that name which hands the command line over (``handover.py``) to the process that waits
(``waiting.py``), or becomes Flower's own where none does.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from anabranch.coordinator.flower import SERVER_APP, command
from anabranch.coordinator.supervision import handover, processes, waiting
from anabranch.coordinator.supervision.config import CoordinatorConfig

log = logging.getLogger("anabranch.coordinator.up")

COMMAND = "flwr-serverapp"
"""What Flower calls."""
AGAIN_S = 60.0
"""Fewest seconds between two starts where the first came to nothing: one that cannot load would
keep a processor busy for ever."""


def folder_of(home: Path) -> Path:
    """The folder of a standby, in Flower's home."""
    return home.absolute() / "standby"


class Standby:
    """Keeps one process waiting, from one ServerApp to the next.

    Args:
        config: Says whether there is to be one, and where.
        env: Its environment: that of the SuperLink, whose child it stands for.

    Attributes:
        log: What they write.
    """

    def __init__(self, config: CoordinatorConfig, env: dict[str, str]) -> None:
        self._wanted, self._env = config.standby, env
        self._folder = folder_of(config.home)
        self.log = config.home / "serverapp.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._since_s = float("-inf")
        self._at_work: list[subprocess.Popen[bytes]] = []

    def tend(self, holder: int | None = None) -> None:
        """Have one that waits, where the last one was taken and is at work, or is gone.

        Args:
            holder: Process that runs the rounds.
        """
        if not self._wanted:
            return
        self._at_work = [child for child in self._at_work if child.poll() is None]
        child, early = self._child, time.monotonic() - self._since_s < AGAIN_S
        if child is None:
            if not early:
                self._start()
        elif child.pid == holder:
            # Not before: the next one's loading would hold up its first steps.
            self._at_work.append(child)
            self._start()
        elif (code := child.poll()) is not None:
            if self._taken:
                self._start()
            elif not early:
                self._warn(f"the standby {processes.how(code)}; another one is started")
                self._start()

    @property
    def waits(self) -> list[int]:
        """The process that waits, or loads; none where it was taken."""
        child = self._child
        if child is None or child.poll() is not None or self._taken:
            return []
        return [child.pid]

    def last_words(self) -> str:
        """The last lines of the log of those that waited, the ServerApp among them."""
        return processes.tail(self.log)

    def end(self) -> None:
        """Leave nothing behind."""
        for child in (self._child, *self._at_work):
            if child is not None:
                child.kill()
                child.wait()
        self._child, self._at_work = None, []
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _taken(self) -> bool:
        return (self._folder / waiting.TAKEN_FILE).exists()

    def _start(self) -> None:
        self._child, self._since_s = None, time.monotonic()
        try:
            self._child = self._started()
        except OSError as error:  # no room for it: the rounds go on without
            self._warn(f"there is no standby: {error}")

    def _started(self) -> subprocess.Popen[bytes]:
        # Whoever reaches the socket has a command of Flower's run: nobody else may.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        for name in (handover.SOCKET, waiting.TAKEN_FILE):
            (self._folder / name).unlink(missing_ok=True)
        # In one step: a shell that has just been told to run it finds it there and whole.
        words = [sys.executable, "-IS", handover.__file__, str(self._folder), self._real()]
        fresh = self._folder / f"{COMMAND}.new"
        fresh.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        fresh.chmod(0o700)
        fresh.rename(self._folder / COMMAND)
        return processes.start(self._arguments(), self.log, self._env)

    def _warn(self, told: str) -> None:
        log.warning(told, extra={"event": "standby"})

    def _real(self) -> str:
        """The command that Flower would find otherwise."""
        return command(COMMAND)

    def _arguments(self) -> list[str]:
        """The command line of the process that waits."""
        module = SERVER_APP.partition(":")[0]
        return [
            sys.executable, "-P", "-m", waiting.__name__, str(self._folder),
            "flwr.superlink.cli:flwr_serverapp", module,
        ]  # fmt: skip

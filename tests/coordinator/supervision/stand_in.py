"""What stands in for Flower and for training, as processes that start in a second.

``up FOLDER`` is the real supervisor with a SuperLink that is ``link``; that one starts ``app`` in a
session of its own when it is asked to, by the name that Flower's uses. A process may wait to be the
next one. The app keeps the real lease and the real
store, and admits an update of each of four clients to each of its rounds. ``fleet FOLDER FIRST
LAST`` is the real fleet, whose supervisors are ``up``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from anabranch.coordinator import logs
from anabranch.coordinator.federation import load_federation
from anabranch.coordinator.rounds.control import Control, Want, heeded
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import Contribution, open_store
from anabranch.coordinator.supervision.config import (
    CoordinatorConfig,
    FleetConfig,
    load_coordinator,
)
from anabranch.coordinator.supervision.fleet import Fleet
from anabranch.coordinator.supervision.lease import held
from anabranch.coordinator.supervision.standby import COMMAND, Standby
from anabranch.coordinator.supervision.superlink import SuperLink
from anabranch.coordinator.supervision.supervisor import Supervisor

STEP_S = 0.1
SCRIPTS = "scripts"
"""Where the command is that Flower would find without a standby, in its home."""


class StandIn(SuperLink):
    """Its process is ``link``, and ``flwr`` is a line sent to it."""

    def __init__(self, config: CoordinatorConfig, environ: dict[str, str]) -> None:
        super().__init__(config, environ)
        scripts = config.home / SCRIPTS
        scripts.mkdir(parents=True, exist_ok=True)
        script = scripts / COMMAND
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} app "$@"\n')
        script.chmod(0o700)
        first, rest = self.env["PATH"].split(os.pathsep, 1)
        self.env["PATH"] = os.pathsep.join([first, str(scripts), rest])

    def _arguments(self) -> list[str]:
        port, folder = str(self._config.port), str(self._config.federation)
        return [sys.executable, __file__, "link", port, folder]

    def register(self) -> list[str]:
        """Everybody may join."""
        return []

    def submit(self) -> str:
        """Ask for an app; its run's number is the time."""
        run = str(time.time_ns())
        with socket.create_connection(("127.0.0.1", self._config.port), timeout=10) as line:
            line.sendall(run.encode())
        return run

    def fate(self, run: str) -> str:
        """Nobody knows."""
        return "unknown"

    def forget(self, run: str) -> subprocess.Popen[bytes]:
        """Nothing waits for it."""
        return subprocess.Popen(["true"])


class StandInStandby(Standby):
    """Waits to be an ``app``."""

    def __init__(self, config: CoordinatorConfig, env: dict[str, str]) -> None:
        super().__init__(config, env | {"PYTHONPATH": os.pathsep.join(sys.path)})

    def _real(self) -> str:
        return str(self._folder.with_name(SCRIPTS) / COMMAND)

    def _arguments(self) -> list[str]:
        return [*super()._arguments()[:5], "stand_in:serverapp"]


def up(folder: Path) -> int:
    """The supervisor."""
    logs.configure("json")
    config: CoordinatorConfig = load_coordinator(folder)
    return int(Supervisor(config, "json", StandIn, StandInStandby).run())


def fleet(folder: Path, first: int, last: int) -> int:
    """Supervisors of all that is started."""
    logs.configure("json")
    config = FleetConfig.model_validate(
        {
            "ports": (first, last), "insecure": True, "tasks": {"numbers": {"task": "a.b:C"}},
            "restart": {"first_s": 0.1, "cap_s": 0.2},
        }
    )  # fmt: skip
    return int(Fleet(folder, config, [sys.executable, __file__, "up"]).run())


def link(port: int, folder: Path) -> None:
    """Start an app whenever it is asked to, and first the one that it owes."""
    owed = folder / "owed"
    if owed.exists():
        subprocess.Popen([COMMAND, str(folder), owed.read_text()], start_new_session=True)
        owed.unlink()
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            line, _ = server.accept()
            with line:
                run = line.recv(64).decode()
            if run:
                subprocess.Popen([COMMAND, str(folder), run], start_new_session=True)


def serverapp() -> None:
    """An app in a process that waited for it."""
    app(Path(sys.argv[1]), sys.argv[2])


def app(folder: Path, run: str) -> None:
    """Rounds in which nobody trains."""
    with held(folder, run):
        config = load_federation(folder)
        if (folder / "broken").exists():
            raise ValueError("the folder is broken")
        store = open_store(
            config.store, folder, federation=config.name, run=config.run, durable=False
        )
        control = Control(store)
        control.begin()
        while (folder / "hold").exists():
            time.sleep(STEP_S)
        while (number := standing(config, store).done + 1) <= config.rounds:
            done = {row.client for row in store.contributions(number)}
            asked = [f"site-{index}" for index in range(4) if f"site-{index}" not in done]
            store.note("planned", {"round": number, "asked": asked, "by": run})
            store.note("state", {"round": number, "state": "collecting"})
            for client in asked:
                time.sleep(STEP_S)
                # The last round waits for the test.
                waits = number == config.rounds
                while control.want() is Want.RUN and waits:
                    time.sleep(STEP_S)
                    waits = not (folder / "finish").exists()
                if control.want() is Want.STOP:
                    return
                if control.want() is not Want.RUN:
                    why = f"the operator asked to {control.want()}"
                    store.note("stopped", {"round": number, "reason": why})
                    heeded(store)
                    return
                digest = store.put(f"{number} {client}".encode())
                store.admit(
                    Contribution(
                        round=number, client=client, digest=digest, size_bytes=8,
                        nonce=f"{number:02x}{client[-1]}0",
                    )
                )  # fmt: skip
            store.note("round", {"round": number, "status": "published"})


if __name__ == "__main__":
    if sys.argv[1] == "up":
        sys.exit(up(Path(sys.argv[2])))
    if sys.argv[1] == "fleet":
        sys.exit(fleet(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
    if sys.argv[1] == "link":
        link(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        app(Path(sys.argv[2]), sys.argv[3])

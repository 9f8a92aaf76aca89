"""A SuperLink of one federation: its command line, who may join, and the runs on it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import Any

import tomli_w

from anabranch.coordinator.flower import (
    FlowerError,
    command,
    environment,
    flwr,
    wait_for_port,
    write_bundle,
)
from anabranch.coordinator.supervision import processes
from anabranch.coordinator.supervision.config import CoordinatorConfig
from anabranch.coordinator.supervision.standby import folder_of
from anabranch.wire.errors import one_line

LINK = "link"
"""Name of the connection in FLWR_HOME's configuration."""

CHATTER = ("[uvicorn.access]", "[Fleet.", "ControlServicer.")
"""What lines of a SuperLink's log hold that say nothing of why it died."""

POLL_S = "0.2"
"""Seconds between two looks of Flower's SuperExec for a task; its default is 1."""


class SuperLink:
    """One SuperLink process, in a home of its own.

    Args:
        config: What it is for.
        environ: Further environment of everything that it starts.

    Attributes:
        env: The environment of its processes, and of ``flwr``.
        log: File of its output.
    """

    def __init__(self, config: CoordinatorConfig, environ: dict[str, str]) -> None:
        self._config = config
        self.log = config.home / "superlink.log"
        self._database = config.home / "state.db"
        self._registered = config.home / "registered.json"
        self.env = {
            **environment(config.home, config.port),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_S,
            **environ,
        }
        if config.standby:
            # Flower finds its command there first.
            self.env["PATH"] = os.pathsep.join([str(folder_of(config.home)), self.env["PATH"]])
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            FlowerError: It ended, or does not answer in time.
        """
        config = self._config
        config.home.mkdir(parents=True, exist_ok=True)
        if not self._database.exists():
            self._registered.unlink(missing_ok=True)
        link: dict[str, str | bool] = {"address": self.address}
        if config.tls is None:
            link["insecure"] = True
        else:
            link["root-certificates"] = str(config.tls.authority)
        (config.home / "config.toml").write_text(tomli_w.dumps({"superlink": {LINK: link}}))
        self._child = processes.start(self._arguments(), self.log, self.env)
        wait_for_port(config.port, self._child, self.log, config.start_s, config.host)

    @property
    def address(self) -> str:
        """Where it listens."""
        host = self._config.host
        return f"[{host}]:{self._config.port}" if ":" in host else f"{host}:{self._config.port}"

    @property
    def pid(self) -> int | None:
        """Its process."""
        return self._child.pid if self._child else None

    def died(self) -> str | None:
        """Why it is not running; None while it is."""
        if self._child is None:
            return "it was not started"
        code = self._child.poll()
        return None if code is None else processes.how(code)

    def last_words(self) -> str:
        """The last lines of its log, without what Flower says of each request."""
        return processes.tail(self.log, lambda line: not any(word in line for word in CHATTER))

    def stop(self, patience_s: float) -> None:
        """End it."""
        if self._child is not None and self._child.poll() is None:
            processes.end(self._child, patience_s)

    def register(self) -> list[str]:
        """Let the nodes join whose public keys lie in the folder; returns names of new ones.

        Raises:
            FlowerError: A key is refused.
        """
        folder = self._config.node_keys
        if folder is None:
            return []
        known: dict[str, str] = {}
        if self._registered.exists():
            known = json.loads(self._registered.read_text())
        new = []
        for path in sorted(folder.glob("*.pub")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in known:
                continue
            try:
                self._flwr("supernode", "register", str(path), LINK)
            except FlowerError as error:
                # Killed between the two, it is in Flower's database and not in this list.
                if "already" not in str(error):
                    raise FlowerError(f"{path}: {error}") from error
            known[digest] = path.stem
            self._registered.write_text(json.dumps(known, indent=1))
            new.append(path.stem)
        return new

    def submit(self) -> str:
        """Begin a run; returns Flower's number of it.

        Raises:
            FlowerError: It was refused.
        """
        config = self._config
        bundle = write_bundle(
            config.home / "bundle",
            {
                "federation": str(config.federation),
                "task": config.task,
                "task-params": json.dumps(config.task_params, sort_keys=True),
            },
            client_app=config.client_app,
        )
        return str(self._flwr("run", str(bundle), LINK)["run-id"])

    def fate(self, run: str) -> str:
        """What Flower says became of a run."""
        try:
            rows = self._flwr("list", LINK)["runs"]
        except FlowerError as error:
            return one_line(str(error))
        for row in rows:
            if str(row["run-id"]) == run:
                return one_line(f"{row['status']}: {row['status-details']}")
        return "Flower knows no such run"

    def forget(self, run: str) -> subprocess.Popen[bytes]:
        """Have Flower stop a run whose ServerApp is gone, meanwhile: it would wait for its pulse.

        What it still holds for nodes would be trained for nobody.
        """
        return processes.start(
            [command("flwr"), "stop", run, LINK], self._config.home / "stopped.log", self.env
        )

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        return flwr(list(arguments), self.env, lambda: self.died() is None, self._config.start_s)

    def _arguments(self) -> list[str]:
        config = self._config
        arguments = [
            command("flower-superlink"),
            "--disable-runtime-dependency-installation",
            "--database", str(self._database),
            "--host", config.host,
            "--port", str(config.port),
        ]  # fmt: skip
        if config.tls is None:
            return [*arguments, "--insecure"]
        arguments += [
            "--ssl-certfile", str(config.tls.certificate),
            "--ssl-keyfile", str(config.tls.key),
            "--ssl-ca-certfile", str(config.tls.authority),
        ]  # fmt: skip
        if config.node_keys is not None:
            arguments.append("--enable-supernode-auth")
        return arguments

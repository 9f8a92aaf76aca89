"""A federation that is started by way of the API: looked at as `doctor` does, given a port, noted.

`anabranch coordinator up` with the API's configuration sees the note and keeps it at work.
"""

from __future__ import annotations

import threading

from grpc import StatusCode

from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.peers import EVERY, Grant
from anabranch.coordinator.api.refusal import RefusedCallError
from anabranch.coordinator.api.shelf import Served, Shelf
from anabranch.coordinator.doctor import Finding
from anabranch.coordinator.rounds.control import Want, ask, latest
from anabranch.coordinator.rounds.service import Service, service, start
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.supervision.config import FleetConfig
from anabranch.coordinator.supervision.lease import supervised
from anabranch.coordinator.supervision.preflight import examine_coordinator
from anabranch.coordinator.surroundings import port_free

HOST = Grant(Identity("host", "coordinator", Role.ADMIN), (EVERY,))
"""This machine's own: it sees every federation."""


class Starting:
    """Starts federations, one at a time.

    Args:
        shelf: The federations.
        fleet: How they are run; None where this machine runs none for its peers.
    """

    def __init__(self, shelf: Shelf, fleet: FleetConfig | None) -> None:
        self._shelf, self._fleet = shelf, fleet
        self._lock = threading.Lock()

    def start(self, served: Served, task: str, by: str) -> Service:
        """Let a federation be at work.

        Args:
            served: It.
            task: Name of what its nodes train; empty where there is one task only.
            by: Who asks.

        Raises:
            RefusedCallError: ``no-flower``, ``task``, ``started``, ``running``, ``over``,
                ``no-port``; or what `anabranch doctor` would stumble over, as ``start-adapter``.
        """
        if self._fleet is None:
            raise _refused("no-flower", "api.toml has no [flower]: nothing is started from here")
        name = served.config.name
        if not task and len(self._fleet.tasks) == 1:
            (task,) = self._fleet.tasks
        if task not in self._fleet.tasks:
            known = ", ".join(sorted(self._fleet.tasks))
            raise RefusedCallError("task", f"task is {task[:100]!r}; give one of {known}")
        with self._lock:
            before = service(served.store)
            if before is not None and before.started:
                raise RefusedCallError(
                    "started", f"{name} is started already, on port {before.port}",
                    StatusCode.ALREADY_EXISTS,
                )  # fmt: skip
            if supervised(served.folder):
                raise _refused("running", f"{name}: another `coordinator up` works on it")
            if (done := standing(served.config, served.store).done) >= served.config.rounds:
                raise _refused("over", f"{name}: all {done} rounds are over")
            port = self._port(self._fleet, before)
            self._examine(served, self._fleet, port, task)
            if latest(served.store) in (Want.DRAIN, Want.ABORT):
                ask(served.store, Want.RUN, by)
            return start(served.store, port, task, by)

    def _port(self, fleet: FleetConfig, before: Service | None) -> int:
        """The one it had, else one that none had, else one that is free."""
        held: set[int] = set()
        had: set[int] = set()
        for name in self._shelf.names(HOST):
            try:
                now = service(self._shelf.get(HOST, name).store)
            except RefusedCallError:  # it cannot be served, nor started
                continue
            if now is not None:
                (held if now.started else had).add(now.port)
        own = before.port if before else None
        for port in sorted(fleet.every_port, key=lambda one: (one != own, one in had)):
            if port in held:
                continue
            try:
                port_free(fleet.host, port)
            except ValueError:
                continue
            return port
        raise RefusedCallError(
            "no-port", f"none of the ports {fleet.ports[0]} to {fleet.ports[1]} is free; end a "
            "federation, or widen `ports` in api.toml", StatusCode.RESOURCE_EXHAUSTED,
        )  # fmt: skip

    def _examine(self, served: Served, fleet: FleetConfig, port: int, task: str) -> None:
        failed = _first(examine_coordinator(fleet.of(served.folder, port, task)))
        if failed is not None:
            # Where things are on this machine is nobody else's.
            told = failed.told.replace(str(served.folder), served.config.name)
            raise _refused(failed.check.replace(" ", "-"), f"{failed.check}: {told}")


def _first(findings: list[Finding]) -> Finding | None:
    return next((one for one in findings if not one.ok), None)


def _refused(code: str, reason: str) -> RefusedCallError:
    return RefusedCallError(code, reason, StatusCode.FAILED_PRECONDITION)

"""Uploads to our API: it and the clients as processes of their own, on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.client.api.credentials import new_request
from anabranch.coordinator.api.authority import Authority
from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.peers import Grant, Peers
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import Store, open_store
from benchmarks.load import material
from benchmarks.load.updates import NAME, RUN, client_name
from benchmarks.load.watching import Watched, watched


@dataclass(frozen=True)
class Load:
    """How many upload how much.

    Attributes:
        clients: How many there are.
        entries: Of an update.
        at_once: How many upload at a time.
    """

    clients: int
    entries: int
    at_once: int


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Attributes:
        updates_per_s: From the first upload's start until the last was admitted.
        took_s: Of each upload, until it was admitted.
        size_bytes: Of an update.
        server: Memory and CPU of the server's side.
    """

    updates_per_s: float
    took_s: list[float]
    size_bytes: int
    server: Watched


class Api:
    """An API that is served, for loads one after the other.

    Args:
        root: Holds everything.
        load: The clients are enrolled for.
        config: The federation.
        address: Of the API.
        pid: Of its process.
    """

    def __init__(
        self, root: Path, load: Load, config: FederationConfig, address: str, pid: int
    ) -> None:
        self._root, self._load, self._config = root, load, config
        self._address, self._pid = address, pid
        self._round = 0
        self._idle_bytes: int | None = None

    def take(self, at_once: int) -> Outcome:
        """Let every client upload in a new round."""
        store = self.store()
        names = [client_name(number) for number in range(self._load.clients)]
        if self._round:
            store.note("round", {"round": self._round, "status": "abandoned", "reason": "load"})
        self._round += 1
        store.note("planned", {"round": self._round, "asked": names, "planned_s": int(time.time())})
        store.note("state", {"round": self._round, "state": "collecting"})
        plan = material.plan(self._load.clients, self._load.entries, self._round)
        update = self._root / "update.bin"
        update.write_bytes(material.update(plan, self._load.entries))
        spec = self._root / "spec.json"
        spec.write_text(
            json.dumps(
                {
                    "address": self._address, "clients": self._load.clients, "at_once": at_once,
                    "update": str(update), "peers": str(self._root / "peers"),
                }
            )
        )  # fmt: skip
        # What one load left behind counts against the next.
        with watched(self._pid, self._idle_bytes) as seen:
            told = generate([sys.executable, "-m", "benchmarks.load.clients", str(spec)])
        self._idle_bytes = seen.idle_bytes
        held = store.contributions(self._round)
        store.close()
        assert [row.client for row in held] == sorted(names), "an update is missing"
        return outcome(told, seen)

    def store(self) -> Store:
        """What the coordinator remembers."""
        return open_store(
            self._config.store, self._root / "federations" / NAME,
            federation=NAME, run=RUN,
        )  # fmt: skip


def outcome(told: dict[str, Any], seen: Watched) -> Outcome:
    """What a generator told, and what was seen of the server meanwhile."""
    rate = len(told["took_s"]) / (told["ended"] - told["began"])
    return Outcome(rate, told["took_s"], told["size_bytes"], seen)


def generate(arguments: list[str], env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a load generator: it is ready, it is told to begin, it tells what came of it."""
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", "the clients could not be made ready"
        child.stdin.write("\n")
        child.stdin.flush()
        told: dict[str, Any] = json.loads(child.stdout.readline())
    return told


@contextmanager
def api(root: Path, load: Load) -> Iterator[Api]:
    """An API with a federation and its clients enrolled, served while the block runs."""
    config = material.write(root / "federations" / NAME, load.clients, load.entries)
    enrol(root, load.clients)
    path = root / "api.toml"
    # A busy machine is slower than any network: nobody is ended for that.
    path.write_text(
        'federations = "federations"\nstate = "api"\nport = 0\nenrol_port = 0\n'
        "limits.stall_s = 300\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load.server", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        try:
            port = int(child.stdout.readline())
            yield Api(root, load, config, f"localhost:{port}", child.pid)
        finally:
            assert child.stdin is not None
            child.stdin.close()
            child.wait(60)


def enrol(root: Path, clients: int) -> None:
    """Give every client a certificate, as an enrolment would."""
    state, folder = root / "api", root / "peers"
    for one in (state, folder):
        one.mkdir(parents=True, mode=0o700)
    authority, peers = Authority(state), Peers(state / "peers.db")
    (folder / "ca.pem").write_bytes(authority.pem)
    for number in range(clients):
        name = client_name(number)
        identity = Identity(f"org-{name}", name, Role.CLIENT)
        token, _ = peers.invite(Grant(identity, (NAME,)), 3600)
        key, request = new_request(name)
        made, pem = authority.issue(request, identity, 86_400)
        peers.redeem(token, f"{made.serial_number:x}", made.not_valid_after_utc.timestamp())
        (folder / f"{name}.key").write_bytes(key)
        (folder / f"{name}.pem").write_bytes(pem)
    peers.close()

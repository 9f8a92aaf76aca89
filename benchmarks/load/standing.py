"""How long it takes to say where 100 federations of 10,000 enrolled clients stand."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, insert

from anabranch.client.api.caller import Caller
from anabranch.client.api.credentials import Credentials, Invitation
from anabranch.client.api.enrolling import enrol
from anabranch.coordinator.api.config import ApiConfig
from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.peers import EVERY, Grant
from anabranch.coordinator.api.server import serving
from anabranch.coordinator.federation import FederationConfig, write_federation
from anabranch.coordinator.rounds.overview import overview
from anabranch.coordinator.store.database import connect
from anabranch.coordinator.store.schema import contributions, federations, notes, refusals
from anabranch.wire.v1 import coordinator_pb2 as pb

FEDERATIONS, CLIENTS, ROUNDS = 100, 100, 50
"""Clients are those of one federation."""


def fill(engine: Engine, count: int) -> None:
    """Federations in the middle of a round, with as many behind them, each client in each."""
    clients = [f"client-{number:04}" for number in range(CLIENTS)]
    with engine.begin() as connection:
        for key in range(1, count + 1):
            about = {"federation": key, "time": 0.0}
            connection.execute(insert(federations), {"id": key, "name": f"f{key:03}", "run": "r"})
            rows, admitted = [], []
            for number in range(1, ROUNDS + 1):
                of = {"round": number}
                rows.append({**about, "event": "planned", "facts": {**of, "asked": clients}})
                rows.append({**about, "event": "state", "facts": {**of, "state": "merging"}})
                ended = {**of, "status": "abandoned", "reason": "few", "excluded": clients}
                if number < ROUNDS:
                    rows.append({**about, "event": "round", "facts": ended})
                held = {"digest": "d", "size_bytes": 1, "nonce": "", "metrics": {}}
                admitted += [{**about, **of, **held, "client": name} for name in clients]
            connection.execute(insert(notes), rows)
            connection.execute(insert(contributions), admitted)
            left = {**about, "round": ROUNDS, "code": "norm", "reason": "too large"}
            connection.execute(insert(refusals), [{**left, "client": name} for name in clients[:9]])


def status_ms(folder: Path, count: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each look: at all federations, and at one by way of the API."""
    url = f"sqlite:///{folder / 'store.db'}"
    engine = connect(url, durable=False)
    fill(engine, count)
    found = overview(engine)
    assert [(one.round, one.asked, one.admitted) for one in found] == [
        (ROUNDS, CLIENTS, CLIENTS)
    ] * count
    every = _timed(lambda: overview(engine), runs)
    engine.dispose()
    for number in range(1, count + 1):
        given = {"name": f"f{number:03}", "run": "r", "store": {"url": url}}
        config = FederationConfig.model_validate(given)
        write_federation(config, folder / "federations" / config.name)
    return {"of all": every, "of one, over gRPC": _asked(folder, count, runs)}


def _asked(folder: Path, count: int, runs: int) -> list[float]:
    """Looks of an operator at each federation in turn, 10,000 clients being enrolled."""
    given = {"federations": folder / "federations", "state": folder / "api", "port": 0}
    limits = {"calls_per_s": 10_000, "burst": 10_000}
    config = ApiConfig.model_validate({**given, "enrol_port": 0, "limits": limits})
    names = itertools.cycle(f"f{number:03}" for number in range(1, count + 1))
    with serving(config) as server:
        _register(config.state / "peers.db", count * CLIENTS)
        token, _ = server.peers.invite(Grant(Identity("us", "op", Role.OPERATOR), (EVERY,)), 3600)
        address, enrol_address = (f"localhost:{port}" for port in (server.port, server.enrol_port))
        invitation = Invitation(token, server.authority.pem, address, enrol_address)
        enrol(invitation, folder / "op")
        with Caller(address, Credentials(folder / "op")) as caller:

            def look() -> None:
                request = pb.StatusRequest(federation=next(names))
                reply = caller.call("Federations.Status", request)
                assert len(reply.asked) == CLIENTS

            # Each federation is opened once; what is timed is a coordinator that runs.
            _timed(look, count)
            return _timed(look, runs)


def _register(path: Path, clients: int) -> None:
    """Put certificates of clients into the register, as many enrolments would."""
    until_s = time.time() + 86_400
    rows = [
        (f"{number:x}", f"org-{number}", f"client-{number}", "client", '["f001"]', until_s, None, 0)
        for number in range(clients)
    ]
    with closing(sqlite3.connect(path, timeout=30)) as base, base:
        base.executemany("insert into certificates values (?, ?, ?, ?, ?, ?, ?, ?)", rows)


def _timed(call: Callable[[], object], runs: int) -> list[float]:
    took_ms = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        took_ms.append((time.perf_counter() - began) * 1e3)
    return took_ms

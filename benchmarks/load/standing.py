"""How long it takes to say where 100 federations of 10,000 enrolled clients stand."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine, insert

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.overview import overview
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import open_store
from anabranch.coordinator.store.database import connect
from anabranch.coordinator.store.schema import contributions, federations, notes, refusals

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


def status_ms(folder: Path, count: int, runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each look at all federations, and at one."""
    url = f"sqlite:///{folder / 'store.db'}"
    engine = connect(url, durable=False)
    fill(engine, count)
    found = overview(engine)
    assert [(one.round, one.asked, one.admitted) for one in found] == [
        (ROUNDS, CLIENTS, CLIENTS)
    ] * count
    every = _timed(lambda: overview(engine), runs)
    engine.dispose()
    config = FederationConfig.model_validate(
        {"name": f"f{count:03}", "run": "r", "store": {"url": url}}
    )
    with closing(open_store(config.store, folder, federation=config.name, run="r")) as store:
        assert len(standing(config, store).asked) == CLIENTS
        one = _timed(lambda: standing(config, store), runs)
    return every, one


def _timed(call: Callable[[], object], runs: int) -> list[float]:
    took_ms = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        took_ms.append((time.perf_counter() - began) * 1e3)
    return took_ms

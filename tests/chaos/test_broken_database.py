"""The database is killed, cut off, hangs or is locked in a round: the same round goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, check, config, run
from tests.chaos.line import Line, State
from tests.chaos.postgres import Postgres

from anabranch.coordinator.flower import free_port
from anabranch.coordinator.store import database, patience

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
SAME = "the same round goes on; nothing lost, nothing counted twice"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres(free_port()) as running:
        yield running


def at_some_moment(seed: int, told: Told, breaks: Callable[[], None]) -> Callable[[int], None]:
    """Break it beside a run, a little after some update came, seldom between two statements."""
    draw = random.Random(seed)
    at, after_s = draw.randrange(1, 3 * CLIENTS), draw.uniform(0, 0.03)

    def beside() -> None:
        time.sleep(after_s)
        told.broke()
        breaks()

    def moment(count: int) -> None:
        if count == at:
            threading.Thread(target=beside).start()

    return moment


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_database_that_is_killed(server: Postgres, seed: int, tmp_path: Path, told: Told) -> None:
    up = threading.Event()

    def breaks() -> None:
        server.kill()
        time.sleep(0.5)
        server.start()
        up.set()

    cfg = config(store={"url": server.database(), "patience_s": 60})
    run(cfg, tmp_path, at_some_moment(seed, told, breaks))
    assert up.wait(30)
    check(cfg, tmp_path)
    told.outcome("PostgreSQL killed with -9 in a round, and started again", SAME)


@pytest.mark.parametrize("seed", range(RUNS))
def test_connections_that_are_cut(server: Postgres, seed: int, tmp_path: Path, told: Told) -> None:
    cfg = config(store={"url": server.database(), "patience_s": 60})
    run(cfg, tmp_path, at_some_moment(seed, told, server.end_all))
    check(cfg, tmp_path)
    told.outcome("every connection to PostgreSQL ended by the server", SAME)


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("state", ["cut", "dead", "deaf", "dumb"] if RUNS > 1 else ["dead"])
def test_a_line_to_the_database_that_is_cut(
    server: Postgres,
    state: State,
    seed: int,
    tmp_path: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Half a minute each in service.
    monkeypatch.setattr(patience, "ANSWER_S", 0.5)
    monkeypatch.setitem(database.SERVED, "idle_in_transaction_session_timeout", "1s")
    with Line(server.port) as line:

        def breaks() -> None:
            line.set(state)
            time.sleep(1.5)
            line.renew()

        name = server.database().removeprefix("postgresql:///").partition("?")[0]
        url = f"postgresql://postgres@127.0.0.1:{line.port}/{name}"
        cfg = config(store={"url": url, "patience_s": 60})
        run(cfg, tmp_path, at_some_moment(seed, told, breaks))
        check(cfg, tmp_path)
    how = {
        "cut": "ended",
        "dead": "silent in both directions",
        "deaf": "silent towards the server",
        "dumb": "silent from the server",
    }
    told.outcome(f"line to PostgreSQL {how[state]} for a while", SAME)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_database_that_another_process_locks(
    seed: int, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.coordinator.store.database.BUSY_S", 0.2)
    hold = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], 9, isolation_level=None);"
        "c.execute('BEGIN EXCLUSIVE'); time.sleep(1.5)"
    )

    def breaks() -> None:
        subprocess.run([sys.executable, "-c", hold, str(tmp_path / "store.db")], check=True)

    cfg = config(store={"patience_s": 60})
    run(cfg, tmp_path, at_some_moment(seed, told, breaks))
    check(cfg, tmp_path)
    told.outcome("SQLite locked by another process for longer than SQLite waits", SAME)

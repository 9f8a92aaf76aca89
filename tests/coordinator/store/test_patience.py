"""Databases that are killed, cut off, hang or are locked: waited for, and nothing counts twice."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from tests.chaos.line import Line
from tests.chaos.postgres import Postgres

from anabranch.coordinator.flower import free_port
from anabranch.coordinator.store import (
    Contribution,
    LostError,
    Publication,
    Refusal,
    Store,
    StoreConfig,
    database,
    open_store,
)
from anabranch.coordinator.store import patience as patience_module
from anabranch.coordinator.store.sql import SqlStore


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres(free_port()) as running:
        yield running


def store_of(url: str, folder: Path, **changes: Any) -> SqlStore:
    config = StoreConfig(url=url, **changes)
    found = open_store(config, folder, federation="f", run="r", patient=True)
    assert isinstance(found, SqlStore)
    return found


def row(store: Store, client: str, number: int = 1) -> Contribution:
    digest = store.put(client.encode())
    return Contribution(round=number, client=client, digest=digest, size_bytes=len(client))


def test_a_database_that_is_killed_is_waited_for(
    server: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(store_of(server.database(), tmp_path, patience_s=30)) as store:
        assert store.admit(row(store, "a"))
        server.kill()
        back = threading.Timer(1.0, server.start)
        back.start()
        with caplog.at_level(logging.WARNING):
            assert store.admit(row(store, "b"))
        back.join()
        assert "does not answer, waiting" in caplog.text
        assert "answers again" in caplog.text
        assert [one.client for one in store.contributions(1)] == ["a", "b"]
        assert not store.admit(row(store, "b"))


def test_one_that_is_away_is_waited_for_at_the_opening_too(
    server: Postgres, tmp_path: Path
) -> None:
    url = server.database()
    server.kill()
    back = threading.Timer(1.0, server.start)
    back.start()
    with closing(store_of(url, tmp_path, patience_s=30)) as store:
        assert store.admit(row(store, "a"))
    back.join()
    server.kill()
    with pytest.raises(LostError, match=r"does not answer since .*; start it and run again"):
        store_of(url, tmp_path, patience_s=0.5)
    # Whoever only looks hears it at once.
    with pytest.raises(ValueError, match="cannot be opened"):
        open_store(StoreConfig(url=url), tmp_path, federation="f", run="r")
    server.start()


def test_one_that_stays_away_is_given_up_in_one_line(server: Postgres, tmp_path: Path) -> None:
    with closing(store_of(server.database(), tmp_path, patience_s=0.5)) as store:
        server.kill()
        with pytest.raises(LostError, match=r"does not answer since .*; start it and run again"):
            store.note("x", {})
        server.start()
        store.note("y", {})
        assert (store.notes("x"), len(store.notes("y"))) == ([], 1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_line_that_is_cut_at_a_commit_does_nothing_twice(
    server: Postgres, tmp_path: Path, when: str
) -> None:
    """The server ends the connection before, or after, it has committed; nobody can tell which."""
    with closing(store_of(server.database(), tmp_path, patience_s=30)) as store:
        cuts = 0

        @event.listens_for(store.engine, "commit")
        def _cut(connection: Any) -> None:
            nonlocal cuts
            if cuts:
                return
            cuts = 1
            raw = connection.connection.dbapi_connection
            if when == "after":
                raw.commit()
            server.end_backend(raw.info.backend_pid)

        def lost(work: Callable[[], Any]) -> Any:
            nonlocal cuts
            cuts = 0
            found = work()
            assert cuts == 1
            return found

        first = row(store, "a")
        assert lost(lambda: store.admit(first)) is True
        assert not store.admit(first)
        lost(lambda: store.note("secure", {"round": 1}))
        lost(lambda: store.refuse(Refusal(round=1, client="b", code="c", reason="")))
        publication = Publication(round=1, digest=first.digest, adapter_hash="h")
        lost(lambda: store.publish(publication, {"round": 1}))
        lost(lambda: store.tag("champion", 1))
        assert len(store.contributions()) == len(store.notes("secure")) == 1
        assert len(store.refusals()) == len(store.notes("round")) == 1
        assert [one.round for one in store.publications()] == [1]
        assert store.tags() == {"champion": 1}


def test_a_server_that_hangs_is_cut_off_and_waited_for(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "ANSWER_S", 0.3)
    with closing(store_of(server.database(), tmp_path, patience_s=30)) as store:
        store.note("x", {})
        with server.hanging():
            threading.Timer(1.0, server.go_on).start()
            store.note("x", {})
        assert len(store.notes("x")) == 2


def test_a_line_that_dies_in_a_transaction_leaves_no_lock_behind(
    server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has done the work, and waits for a word that never comes."""
    monkeypatch.setattr(patience_module, "ANSWER_S", 0.5)
    monkeypatch.setitem(database.SERVED, "idle_in_transaction_session_timeout", "1s")
    name = server.database().removeprefix("postgresql:///").partition("?")[0]
    with Line(server.port) as line:
        url = f"postgresql://postgres@127.0.0.1:{line.port}/{name}"
        with closing(store_of(url, tmp_path, patience_s=30)) as store:
            died: list[str] = []

            @event.listens_for(store.engine, "before_cursor_execute")
            def _die(_: Any, __: Any, statement: str, *___: Any) -> None:
                if "INSERT INTO notes" in statement and not died:
                    died.append(statement)
                    line.set("dumb")
                    threading.Timer(0.3, line.renew).start()

            store.note("x", {})
            assert (len(died), len(store.notes("x"))) == (1, 1)


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (psycopg.errors.ConnectionTimeout(), True),
        (psycopg.OperationalError(), True),
        (psycopg.errors.AdminShutdown(), True),
        (psycopg.errors.DeadlockDetected(), True),
        (psycopg.errors.UniqueViolation(), False),
        (psycopg.errors.DiskFull(), False),
    ],
)
def test_what_another_try_may_do_without(error: Exception, gone: bool) -> None:
    assert patience_module.is_gone(DBAPIError("", {}, error)) is gone


def test_sqlite_that_another_process_locks_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("anabranch.coordinator.store.database.BUSY_S", 0.2)
    url = f"sqlite:///{tmp_path}/s.db"
    hold = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); time.sleep(1.5)"
    )
    with closing(store_of(url, tmp_path, patience_s=30)) as store:
        command = [sys.executable, "-c", hold, f"{tmp_path}/s.db"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            assert store.admit(row(store, "a"))
        assert other.returncode == 0
        assert "database is locked" in caplog.text
        assert [one.client for one in store.contributions()] == ["a"]
        # One that never lets go is named.
        with closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as lock:
            lock.execute("BEGIN IMMEDIATE")
            store._patient._patience_s = 0.1
            with pytest.raises(LostError, match="database is locked"):
                store.note("x", {})

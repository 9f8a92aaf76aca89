"""What ``doctor`` finds out about databases and clocks, on real ones."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from anabranch.coordinator import surroundings
from anabranch.coordinator.store import StoreConfig
from anabranch.coordinator.store.database import connect, create
from anabranch.wire.receipt import Receipt, encode_receipt


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' PostgreSQL does not flush; the other settings are as they have to be."""
    monkeypatch.setattr(surroundings, "FLUSHED", surroundings.FLUSHED[1:])


@pytest.mark.usefixtures("flushed")
def test_both_databases_are_told_by_their_versions(database_url: str, tmp_path: Path) -> None:
    told = surroundings.database(StoreConfig(url=database_url), tmp_path)
    assert told.startswith(("SQLite 3.", "PostgreSQL "))


def test_a_database_that_is_too_old(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "SQLITE", (4, 0, 0))
    monkeypatch.setattr(surroundings, "POSTGRES", 990_000)
    with pytest.raises(ValueError, match=r"is too old; take .*(99|4\.0\.0) or later"):
        surroundings.database(StoreConfig(url=database_url), tmp_path)


def test_a_postgresql_that_does_not_flush(postgres_url: str, tmp_path: Path) -> None:
    engine = create(postgres_url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    engine.dispose()
    with pytest.raises(ValueError, match="has fsync and synchronous_commit off, and loses"):
        surroundings.database(StoreConfig(url=postgres_url), tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    config = StoreConfig(url="sqlite:///s.db")
    surroundings.database(config, tmp_path)
    with sqlite3.connect(tmp_path / "s.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'notes'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (tmp_path / "s.db").open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(ValueError, match=r"s.db is damaged|malformed"):
        surroundings.database(config, tmp_path)


def test_clocks_agree(database_url: str, tmp_path: Path) -> None:
    told = surroundings.clock(StoreConfig(url=database_url), tmp_path, None)
    names = "the artifacts' store"
    if database_url.startswith("postgresql"):
        names += " and the database"
    assert told.endswith(names)


def test_clocks_that_do_not(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock is an hour behind: the file's times and PostgreSQL's are not."""
    config = StoreConfig(url=database_url)
    connect(database_url).dispose()
    real = time.time
    monkeypatch.setattr(surroundings.time, "time", lambda: real() - 3600)
    with pytest.raises(ValueError, match=r"is 3[56]\d\d s ahead of this machine's clock"):
        surroundings.clock(config, tmp_path, None)
    if database_url.startswith("postgresql"):
        monkeypatch.setattr(surroundings, "_artifacts_ahead_s", lambda *_: 0.0)
        with pytest.raises(ValueError, match=r"the database is 3[56]\d\d s ahead"):
            surroundings.clock(config, tmp_path, None)


def test_when_a_bucket_got_something(bucket: str, tmp_path: Path) -> None:
    config = StoreConfig(artifacts=f"s3://{bucket}/p")
    assert surroundings.clock(config, tmp_path, None).endswith("the artifacts' store")


def test_what_a_container_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\n")
    monkeypatch.setattr(surroundings, "MEMINFO", meminfo)
    monkeypatch.setattr(surroundings, "CGROUP", tmp_path)
    assert surroundings.available_bytes() == 3000 << 10
    (tmp_path / "memory.max").write_text("max\n")
    assert surroundings.available_bytes() == 3000 << 10
    (tmp_path / "memory.max").write_text("2048000\n")
    (tmp_path / "memory.current").write_text("1024000\n")
    assert surroundings.available_bytes() == 1_024_000
    monkeypatch.undo()
    assert (
        0
        < surroundings.available_bytes()
        <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    config = StoreConfig(url="sqlite:///s.db")
    for ahead_s, fine in ((-1e6, True), (7200, False)):
        receipt = Receipt(
            kind="abandoned", federation="f", run="r", round=1, time_s=time.time() + ahead_s,
            software="test", base_hash="ab" * 32, start_hash="cd" * 32, reason="few",
        )  # fmt: skip
        data = encode_receipt(receipt, None)
        if fine:
            assert "the last receipt" in surroundings.clock(config, tmp_path, data)
            continue
        with pytest.raises(ValueError, match="the last receipt is 7200 s ahead of this machine"):
            surroundings.clock(config, tmp_path, data)

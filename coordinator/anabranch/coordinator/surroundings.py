"""What a coordinator stands on, for ``doctor``: ports, clocks, a database's version, files' modes.

Each look returns what it found in words, and raises ``ValueError`` with what to do.
"""

from __future__ import annotations

import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, text

from anabranch.coordinator.registry import ENROLLED, KEYS_FOLDER, REVOKED
from anabranch.coordinator.store.config import JOURNAL_URL, StoreConfig
from anabranch.coordinator.store.database import connect, place
from anabranch.coordinator.store.opening import artifacts_of, database_of
from anabranch.wire.receipt import decode_receipt

SKEW_S = 60.0
"""Seconds that two clocks may differ by: garbage is told by its age, certificates by the day."""
SQLITE = (3, 24, 0)
"""The first that knows ``ON CONFLICT``."""
POSTGRES = 100_000
"""Version 10: psycopg talks to no older one."""
FLUSHED = ("fsync", "full_page_writes", "synchronous_commit")
"""Settings of PostgreSQL without which what it committed may be lost."""
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def port_free(host: str, port: int) -> str:
    """Whether this machine can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: what a connection of the last one left behind is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{host}:{port} cannot be listened on ({error.strerror}); end what listens there, "
                "or choose another port"
            ) from error
    return f"{host}:{port} is free"


def database(config: StoreConfig, folder: Path) -> str:
    """Whether the database is one that keeps its word."""
    if config.url == JOURNAL_URL:
        return "a journal: for one process, without quota, retention or backup"
    with _engine(config, folder) as engine:
        if engine.dialect.name == "postgresql":
            return _postgres(engine)
        return _sqlite(engine)


def _postgres(engine: Engine) -> str:
    with engine.connect() as connection:
        number = int(connection.scalar(text("SHOW server_version_num")) or 0)
        version = connection.scalar(text("SHOW server_version"))
        flushed = {name: connection.scalar(text(f"SHOW {name}")) for name in FLUSHED}
    if number < POSTGRES:
        raise ValueError(f"PostgreSQL {version} is too old; take {POSTGRES // 10_000} or later")
    off = [name for name, value in flushed.items() if value == "off"]
    if off:
        raise ValueError(
            f"PostgreSQL has {' and '.join(off)} off, and loses what it has committed when the "
            "power fails; set it on"
        )
    return f"PostgreSQL {version}"


def _sqlite(engine: Engine) -> str:
    if sqlite3.sqlite_version_info < SQLITE:
        raise ValueError(
            f"SQLite {sqlite3.sqlite_version} is too old; take a Python with "
            f"{'.'.join(map(str, SQLITE))} or later"
        )
    with engine.connect() as connection:
        mode = connection.scalar(text("PRAGMA journal_mode"))
        (fault, *_) = connection.scalars(text("PRAGMA quick_check(1)"))
    if mode != "wal":
        raise ValueError(
            f"{place(engine)} is in journal mode {mode}: its file system has no shared memory, as "
            "those of networks; put it on a local disk, or take PostgreSQL"
        )
    if fault != "ok":
        raise ValueError(f"{place(engine)} is damaged ({fault}); restore a backup")
    return f"SQLite {sqlite3.sqlite_version}, with a write-ahead log"


def clock(config: StoreConfig, folder: Path, last_receipt: bytes | None) -> str:
    """Whether this machine's clock agrees with the others it works with, and with its past.

    Args:
        config: The store, whose artifacts may be elsewhere, and whose database too.
        folder: The federation's folder.
        last_receipt: The newest receipt; time has passed since.
    """
    others = {"the artifacts' store": _artifacts_ahead_s(config, folder)}
    if config.url != JOURNAL_URL:
        with _engine(config, folder) as engine:
            if engine.dialect.name == "postgresql":
                others["the database"] = _postgres_ahead_s(engine)
    if last_receipt is not None:
        # In the past it may be as far as it likes.
        others["the last receipt"] = max(
            0.0, decode_receipt(last_receipt, None).time_s - time.time()
        )
    for name, ahead_s in others.items():
        if abs(ahead_s) > SKEW_S:
            way = "ahead of" if ahead_s > 0 else "behind"
            raise ValueError(
                f"{name} is {abs(ahead_s):.0f} s {way} this machine's clock; let both be set by NTP"
            )
    worst = max(map(abs, others.values()))
    return f"within {max(worst, 1):.0f} s of {' and '.join(others)}"


def _postgres_ahead_s(engine: Engine) -> float:
    with engine.connect() as connection:
        before = time.time()
        there = connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
        return float(there or 0.0) - (before + time.time()) / 2


def _artifacts_ahead_s(config: StoreConfig, folder: Path) -> float:
    """By the time that was put beside one byte."""
    kept = artifacts_of(config, folder, durable=False)
    before = time.time()
    digest = kept.put(b"\0")
    return kept.time_s(digest) - (before + time.time()) / 2


def key_files(folder: Path) -> str:
    """Whether nobody but their owner may change who is enrolled, or read a private key."""
    keys = folder / KEYS_FOLDER
    if not keys.is_dir():
        return "there are none"
    for path in (keys, keys / ENROLLED, keys / REVOKED):
        if path.exists() and path.stat().st_mode & 0o022:
            raise ValueError(f"{path}: others may write it, and so enrol themselves; chmod go-w it")
    private = sorted(keys.glob("*.key"))
    for path in private:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"{path}: others may read this private key; chmod 600 it")
    return f"{len(private)} private keys that their owner alone reads"


def available_bytes() -> int:
    """Memory that a process may still take: of the machine, and of its container."""
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    machine = next(int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:")
    most, held = (CGROUP / f"memory.{name}" for name in ("max", "current"))
    if most.exists() and (limit := most.read_text().strip()) != "max":
        return min(machine, max(0, int(limit) - int(held.read_text())))
    return machine


@contextmanager
def _engine(config: StoreConfig, folder: Path) -> Iterator[Engine]:
    engine = connect(database_of(config, folder))
    try:
        yield engine
    finally:
        engine.dispose()

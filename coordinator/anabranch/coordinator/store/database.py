"""Connections to a store's database, and its revision."""

from __future__ import annotations

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError

from anabranch.coordinator.store.artifacts import full
from anabranch.coordinator.store.patience import Patience
from anabranch.coordinator.store.schema import federations

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_S = 30.0
"""Seconds a writer waits for another one of SQLite."""
LOCK = 0x616E61
"""PostgreSQL's advisory lock, held while tables change."""
ALIVE = {
    "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}  # fmt: skip
"""How the system finds out that a line to PostgreSQL is cut: after 25 s."""
SERVED = {
    "idle_in_transaction_session_timeout": "30s",
    "tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3",
    "tcp_user_timeout": "25s",
}  # fmt: skip
"""How PostgreSQL finds out that it serves nobody: until then it would hold the locks of whoever is
gone, for two hours."""
FULL_STATES = ("53100", "53200")
"""PostgreSQL's states of a disk or a memory that is full."""


def connect(url: str, *, durable: bool = True, patience_s: float = 0.0) -> Engine:
    """Open a database and bring its tables to this release's revision.

    Args:
        url: ``sqlite:///FILE`` or ``postgresql://…``; a file is made when missing.
        durable: A commit returns when it is on the disk itself.
        patience_s: Seconds for which a database that does not answer is waited for.

    Raises:
        ValueError: No database can be had there, in one line, or a later release made its tables.
        FullError: There is no room for it.
        LostError: It was waited for, and did not come.
    """
    engine = create(url, durable=durable)
    try:
        with refusing_when_full(engine):
            if patience_s:
                Patience(engine, place(engine), patience_s)(lambda _: migrate(engine))
            else:
                migrate(engine)
    except DatabaseError as error:
        engine.dispose()
        reason = " ".join(str(error.orig).split())
        raise ValueError(f"{place(engine)}: cannot be opened: {reason}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def create(url: str, *, durable: bool = True) -> Engine:
    """The engine of a database, its tables as they are.

    Raises:
        ValueError: The address cannot be read, or PostgreSQL's driver is missing.
    """
    try:
        address = make_url(url)
        port = address.port  # noqa: F841
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"store.url: {url!r} is no address of a database") from error
    if address.drivername == "postgresql":
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "a store in PostgreSQL needs psycopg, which is not installed; "
                "pip install 'anabranch[postgres]'"
            ) from error
        settings = SERVED if durable else {**SERVED, "synchronous_commit": "off"}
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        return create_engine(
            address.set(drivername="postgresql+psycopg"),
            # A database that was restarted is not this coordinator's end.
            pool_pre_ping=True,
            connect_args={"options": options, "connect_timeout": 10, **ALIVE},
        )
    if address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": BUSY_S})
    level = "FULL" if durable else "OFF"

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, record: object) -> None:
        # Python's driver would begin at the first write only, and a backup's reads not at all.
        connection.isolation_level = None
        _write_ahead(connection)
        connection.execute(f"PRAGMA synchronous={level}")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _write_ahead(connection: Any) -> None:
    """Turn to a write-ahead log; SQLite itself does not wait for another one that does."""
    end = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def place(engine: Engine) -> str:
    """A database's address for people, without its password."""
    return engine.url.set(drivername=engine.dialect.name).render_as_string(hide_password=True)


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to a revision, up or down, in one transaction.

    Raises:
        ValueError: The tables are of a revision this release does not know.
    """
    scripts = ScriptDirectory(str(MIGRATIONS))
    wanted = scripts.get_current_head() if revision == "head" else revision
    with engine.connect() as connection:
        if _revision(connection) == wanted:
            return
    alone = engine.execution_options(begin="BEGIN IMMEDIATE")
    with alone.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        # Another process may have been first.
        current = _revision(connection)
        known = {script.revision for script in scripts.walk_revisions()}
        if current is not None and current not in known:
            raise ValueError(
                f"{place(engine)}: its tables are of revision {current}, which this release does "
                "not know; run the release that made them"
            )
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        order = [script.revision for script in scripts.walk_revisions()]  # newest first
        rank = {name: -position for position, name in enumerate(order)}
        lowest = -len(order)
        if rank.get(wanted or "", lowest) >= rank.get(current or "", lowest):
            command.upgrade(config, revision)
        else:
            command.downgrade(config, revision)


def insert_once(connection: Connection, table: Table, row: dict[str, Any]) -> bool:
    """Insert a row; False, and no change, when its key is taken."""
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = make(table).values(row).on_conflict_do_nothing()
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount > 0


def federation_id(connection: Connection, name: str, run: str) -> int:
    """The number of a federation's run, given when it is new."""
    insert_once(connection, federations, {"name": name, "run": run})
    query = select(federations.c.id).where(federations.c.name == name, federations.c.run == run)
    return int(connection.execute(query).scalar_one())


@contextmanager
def refusing_when_full(engine: Engine) -> Iterator[None]:
    """Say a full disk as ``FullError``; the transaction has been rolled back.

    Raises:
        FullError: A disk, a quota of the system or a file is full.
    """
    try:
        yield
    except DBAPIError as error:
        original: Any = error.orig
        name = getattr(original, "sqlite_errorname", "")
        state = getattr(original, "sqlstate", None)
        if name == "SQLITE_FULL" or state in FULL_STATES:
            raise full(place(engine), original) from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise full(place(engine), error) from error
        raise


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()

"""A federation's backup: one tar of its folder, its artifacts and its rows, in this order.

Rows are read in one snapshot, so the coordinator may go on meanwhile. They are plain JSON: what was
kept in SQLite can be restored into PostgreSQL, and the other way round. Enrolled and revoked keys
are in it, the coordinator's own is not: who gets hold of a backup cannot sign.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Engine, insert, select

from anabranch.coordinator.federation import (
    FEDERATION_FILE,
    START_FOLDER,
    FederationConfig,
    load_federation,
    write_federation,
)
from anabranch.coordinator.registry import ENROLLED, KEYS_FOLDER, REVOKED
from anabranch.coordinator.store.archive import add_bytes, new_archive, new_folder
from anabranch.coordinator.store.artifacts import DIGEST, Artifacts
from anabranch.coordinator.store.config import JOURNAL_URL, StoreConfig
from anabranch.coordinator.store.database import connect, federation_id, place
from anabranch.coordinator.store.opening import artifacts_of, database_of
from anabranch.coordinator.store.schema import OF_A_FEDERATION, artifacts, federations

ROWS, FILES, BYTES = "rows.json", "federation", "artifacts"
FORMAT = 1


@dataclass(frozen=True)
class Backup:
    """What a backup holds.

    Attributes:
        federation: The federation's name.
        run: Its run.
        artifacts: How many artifacts.
        size_bytes: Their bytes.
        rows: How many rows, by table.
    """

    federation: str
    run: str
    artifacts: int
    size_bytes: int
    rows: dict[str, int]


def backup(folder: Path, out: Path) -> Backup:
    """Write a federation's backup while its coordinator goes on.

    Args:
        folder: The federation's folder.
        out: The tar to write; it appears when it is whole.

    Raises:
        ValueError: The file exists, the folder holds no federation or one that keeps a journal, or
            an artifact is damaged or missing.
    """
    with new_archive(out) as tar:
        config = load_federation(folder)
        engine = _database(config, folder)
        try:
            kept = artifacts_of(config.store, folder, durable=True)
            return _write(tar, config, folder, engine, kept)
        finally:
            engine.dispose()


def restore(
    file: Path, folder: Path, *, url: str | None = None, artifacts_place: str | None = None
) -> Backup:
    """Make a federation's folder and store from a backup.

    Args:
        file: What ``backup`` wrote.
        folder: Made; where there is one, it is empty.
        url: Database to restore into; None takes the one the federation had.
        artifacts_place: Where artifacts go; None takes where they were.

    Raises:
        ValueError: The file is damaged or no backup, something is in the way, or the store cannot
            be used.
    """
    try:
        with new_folder(folder) as partial, tarfile.open(file) as tar:
            done = _read(tar, partial, url, artifacts_place)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{file}: is damaged or no backup: {error}") from error
    except (KeyError, ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: is damaged or no backup") from error
    return done


def _write(
    tar: tarfile.TarFile, config: FederationConfig, folder: Path, engine: Engine, kept: Artifacts
) -> Backup:
    tables = _snapshot(engine, config)
    for name in (FEDERATION_FILE, START_FOLDER):
        tar.add(folder / name, f"{FILES}/{name}")
    for name in (ENROLLED, REVOKED):
        if (folder / KEYS_FOLDER / name).exists():
            tar.add(folder / KEYS_FOLDER / name, f"{FILES}/{KEYS_FOLDER}/{name}")
    held, size_bytes = [], 0
    for row in tables[artifacts.name]:
        try:
            data = kept.get(row["digest"])
        except KeyError as error:
            # Retention may have let go of it since the snapshot.
            if _is_held(engine, row["digest"]):
                raise ValueError(f"{error.args[0]}: restore an earlier backup") from error
            continue
        add_bytes(tar, f"{BYTES}/{row['digest']}", data)
        held.append(row)
        size_bytes += len(data)
    tables[artifacts.name] = held
    add_bytes(tar, ROWS, json.dumps({"format": FORMAT, "tables": tables}).encode())
    return _summary(config, tables, size_bytes)


def _read(
    tar: tarfile.TarFile, folder: Path, url: str | None, artifacts_place: str | None
) -> Backup:
    """Bring back what a tar holds, in its order; rows come last, in one transaction."""
    settled: tuple[FederationConfig, Artifacts] | None = None
    found: dict[str, int] = {}
    for member in tar:
        top, _, name = member.name.partition("/")
        if top == FILES:
            member.name = name
            tar.extract(member, folder, filter="data")
            continue
        # The folder's files come first, and say where the rest goes.
        config, kept = settled = settled or _settle(folder, url, artifacts_place)
        stream = tar.extractfile(member)
        if stream is None:
            continue
        data = stream.read()
        if top == BYTES and DIGEST.fullmatch(name):
            if kept.put(data) != name:
                raise ValueError(f"artifact {name} of the backup is damaged; restore another one")
            found[name] = len(data)
        elif member.name == ROWS:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise ValueError(
                    f"the backup is of format {content['format']}, this release reads {FORMAT}"
                )
            tables: dict[str, list[dict[str, Any]]] = content["tables"]
            if not {row["digest"] for row in tables[artifacts.name]} <= set(found):
                raise KeyError(BYTES)
            _insert(config, folder, tables)
            return _summary(config, tables, sum(found.values()))
    raise KeyError(ROWS)


def _settle(
    folder: Path, url: str | None, artifacts_place: str | None
) -> tuple[FederationConfig, Artifacts]:
    """The restored configuration, with the places asked for."""
    config = load_federation(folder)
    changes = {
        "url": url or config.store.url,
        "artifacts": artifacts_place or config.store.artifacts,
    }
    try:
        store = StoreConfig(**{**config.store.model_dump(), **changes})
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from error
    config = config.model_copy(update={"store": store})
    write_federation(config, folder)
    return config, artifacts_of(store, folder, durable=True)


def _insert(
    config: FederationConfig, folder: Path, tables: dict[str, list[dict[str, Any]]]
) -> None:
    engine = _database(config, folder)
    try:
        with engine.begin() as connection:
            number = federation_id(connection, config.name, config.run)
            for table in OF_A_FEDERATION:
                if connection.scalar(
                    select(table.c.federation).where(table.c.federation == number).limit(1)
                ):
                    raise ValueError(
                        f"{place(engine)}: holds run {config.run} of {config.name} already; "
                        "restore into another database"
                    )
                # A backup of an earlier release has no rows of later tables.
                if rows := tables.get(table.name):
                    connection.execute(
                        insert(table), [{**row, "federation": number} for row in rows]
                    )
    finally:
        engine.dispose()


def _database(config: FederationConfig, folder: Path) -> Engine:
    if config.store.url == JOURNAL_URL:
        raise ValueError(
            f"{folder}: keeps a journal; copy its folder, or set store.url to a database"
        )
    return connect(database_of(config.store, folder))


def _snapshot(engine: Engine, config: FederationConfig) -> dict[str, list[dict[str, Any]]]:
    """A federation's rows by table, all of one moment."""
    if engine.dialect.name == "postgresql":
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    tables = {}
    with engine.connect() as connection:
        for table in OF_A_FEDERATION:
            columns = [column for column in table.c if column.name not in ("id", "federation")]
            query = (
                select(*columns)
                .join(federations)
                .where(federations.c.name == config.name, federations.c.run == config.run)
                .order_by(*table.primary_key)
            )
            tables[table.name] = [dict(row._mapping) for row in connection.execute(query)]
    return tables


def _is_held(engine: Engine, digest: str) -> bool:
    with engine.connect() as connection:
        query = select(artifacts.c.digest).where(artifacts.c.digest == digest)
        return connection.scalar(query.limit(1)) is not None


def _summary(
    config: FederationConfig, tables: dict[str, list[dict[str, Any]]], size_bytes: int
) -> Backup:
    rows = {table: len(found) for table, found in tables.items() if table != artifacts.name}
    return Backup(config.name, config.run, len(tables[artifacts.name]), size_bytes, rows)

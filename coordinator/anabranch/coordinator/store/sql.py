"""A store in a database: SQLite or PostgreSQL for rows, a folder or a bucket for bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine, Select, Table, delete, exists, func, insert, select

from anabranch.coordinator.store import retention
from anabranch.coordinator.store.artifacts import Artifacts
from anabranch.coordinator.store.base import (
    CLOSED,
    SECRET_EVENT,
    Contribution,
    FullError,
    Happening,
    Publication,
    Refusal,
    Store,
    TakenError,
    following,
)
from anabranch.coordinator.store.database import (
    LOCK,
    federation_id,
    insert_once,
    place,
    refusing_when_full,
)
from anabranch.coordinator.store.patience import Patience
from anabranch.coordinator.store.schema import (
    artifacts,
    contributions,
    federations,
    notes,
    publications,
    receipts,
    refusals,
    tags,
)
from anabranch.wire.receipt import receipt_hash

T = TypeVar("T")
LAST = 16
"""State notes looked back at: a round has three, and again as many after each restart."""


class SqlStore(Store):
    """Keeps a run of a federation in a database, beside others; several processes may read.

    Args:
        engine: The database, at this release's revision (``store.database.connect``).
        kept: Where bytes are.
        federation: The federation's name.
        run: Its run; each has rounds of its own.
        quota_bytes: Artifacts all runs of the federation may keep; None sets no limit.
        keep_rounds: Rounds whose artifacts ``tidy`` keeps; None keeps all.
        patience_s: Seconds for which a database that is gone or locked is waited for.
    """

    def __init__(
        self,
        engine: Engine,
        kept: Artifacts,
        *,
        federation: str,
        run: str,
        quota_bytes: int | None = None,
        keep_rounds: int | None = None,
        patience_s: float = 0.0,
    ) -> None:
        self.engine = engine
        # SQLite would rather fail than wait when a transaction that has read wants to write.
        self._writer = engine.execution_options(begin="BEGIN IMMEDIATE")
        self.kept = kept
        self.name, self.run = federation, run
        self._quota_bytes = quota_bytes
        self._keep_rounds = keep_rounds
        self._patient = Patience(engine, place(engine), patience_s)
        self.id = self._write(lambda connection: federation_id(connection, federation, run))

    def put(self, data: bytes) -> str:  # noqa: D102
        self._check_quota(len(data))
        return self.kept.put(data)

    def put_file(self, path: Path, digest: str) -> str:  # noqa: D102
        self._check_quota(path.stat().st_size)
        return self.kept.put_file(path, digest)

    def get(self, digest: str) -> bytes:  # noqa: D102
        return self.kept.get(digest)

    def admit(self, contribution: Contribution) -> bool:  # noqa: D102
        return self._write(
            lambda connection: self._admit(connection, contribution), contributions, True
        )

    def admit_collecting(self, contribution: Contribution) -> bool:  # noqa: D102
        def work(connection: Connection) -> bool:
            # Writers of one federation go one after the other: a round that closes after this
            # look counts what is admitted here.
            if self._closed(connection, contribution.round):
                raise TakenError(f"round {contribution.round} takes no update any more")
            return self._admit(connection, contribution)

        return self._write(work, contributions, True)

    def refuse(self, refusal: Refusal) -> None:  # noqa: D102
        row = refusal.model_dump()

        def work(connection: Connection) -> None:
            self._add(connection, refusals, row)
            self._add(connection, notes, {"event": "refused", "facts": row})

        self._write(work, refusals)

    def contributions(self, round_number: int | None = None) -> list[Contribution]:  # noqa: D102
        query = self._select(contributions)
        if round_number is not None:
            query = query.where(contributions.c.round == round_number)
        rows = [Contribution(**row) for row in self._rows(query)]
        # Sorted here: databases sort text each by its own rules.
        return sorted(rows, key=lambda row: (row.round, row.client))

    def contribution(  # noqa: D102
        self, round_number: int, client: str
    ) -> Contribution | None:
        query = self._select(contributions).where(
            contributions.c.round == round_number, contributions.c.client == client
        )
        return next((Contribution(**row) for row in self._rows(query)), None)

    def refusals(self, round_number: int | None = None) -> list[Refusal]:  # noqa: D102
        query = self._select(refusals).order_by(refusals.c.id)
        if round_number is not None:
            query = query.where(refusals.c.round == round_number)
        return [Refusal(**row) for row in self._rows(query)]

    def publish(  # noqa: D102
        self, publication: Publication, facts: dict[str, Any], receipts: Sequence[bytes] = ()
    ) -> None:
        size_bytes = self.kept.size(publication.digest)

        def work(connection: Connection) -> None:
            self._open(connection, publication.round)
            if not self._add(connection, publications, publication.model_dump(), once=True):
                raise TakenError(f"round {publication.round} has published already")
            self._hold(connection, publication.digest, size_bytes)
            self._end(connection, facts, receipts)

        self._write(work, publications)

    def abandon(  # noqa: D102
        self, round_number: int, facts: dict[str, Any], receipt: bytes
    ) -> None:
        def work(connection: Connection) -> None:
            self._open(connection, round_number)
            self._end(connection, facts, (receipt,))

        self._write(work, notes)

    def receipts(self) -> list[bytes]:  # noqa: D102
        query = self._select(receipts).order_by(receipts.c.number)
        return [row["content"].encode() for row in self._rows(query)]

    def last_receipt(self) -> bytes | None:  # noqa: D102
        return self._read(self._last)[1]

    def tag(self, name: str, round_number: int | None) -> None:  # noqa: D102
        def work(connection: Connection) -> None:
            connection.execute(
                delete(tags).where(tags.c.federation == self.id, tags.c.name == name)
            )
            if round_number is None:
                return
            found = select(publications.c.round).where(
                publications.c.federation == self.id, publications.c.round == round_number
            )
            if connection.scalar(found) is None:
                raise KeyError(f"round {round_number} has published nothing")
            self._add(connection, tags, {"name": name, "round": round_number})

        self._write(work)

    def tags(self) -> dict[str, int]:  # noqa: D102
        rows = self._rows(self._select(tags))
        return {row["name"]: row["round"] for row in sorted(rows, key=lambda row: row["name"])}

    def publications(self) -> list[Publication]:  # noqa: D102
        query = self._select(publications).order_by(publications.c.round)
        return [Publication(**row) for row in self._rows(query)]

    def latest(self) -> Publication | None:  # noqa: D102
        query = self._select(publications).order_by(publications.c.round.desc()).limit(1)
        return next((Publication(**row) for row in self._rows(query)), None)

    def note(self, event: str, facts: dict[str, Any]) -> None:  # noqa: D102
        row = {"event": event, "facts": facts}
        self._write(lambda connection: self._add(connection, notes, row), notes)

    def notes(self, event: str) -> list[dict[str, Any]]:  # noqa: D102
        query = self._select(notes).where(notes.c.event == event).order_by(notes.c.id)
        return [row["facts"] for row in self._rows(query)]

    def last_note(self, event: str) -> dict[str, Any] | None:  # noqa: D102
        query = self._select(notes).where(notes.c.event == event).order_by(notes.c.id.desc())
        return next((row["facts"] for row in self._rows(query.limit(1))), None)

    def history(self, after: int = 0, most: int = 1000) -> list[Happening]:  # noqa: D102
        query = (
            select(notes.c.id, notes.c.time, notes.c.event, notes.c.facts)
            .where(notes.c.federation == self.id, notes.c.id > after, notes.c.event != SECRET_EVENT)
            .order_by(notes.c.id)
            .limit(most)
        )
        return [
            Happening(cursor=row["id"], time_s=row["time"], event=row["event"], facts=row["facts"])
            for row in self._rows(query)
        ]

    def tidy(self) -> int:  # noqa: D102
        keep = self._keep_rounds
        if keep is not None:
            self._write(lambda connection: retention.let_go(connection, self.id, keep))
        return self._patient(lambda _: retention.sweep(self.engine, self.kept))

    def close(self) -> None:  # noqa: D102
        self.engine.dispose()

    def _admit(self, connection: Connection, contribution: Contribution) -> bool:
        row = contribution.model_dump()
        if not self._add(connection, contributions, row, once=True):
            # A try that was still under way on a line that was cut may have come first.
            return self._holds(connection, contributions, _time_of(connection))
        self._hold(connection, contribution.digest, contribution.size_bytes)
        self._add(connection, notes, {"event": "admitted", "facts": row})
        return True

    def _closed(self, connection: Connection, number: int) -> bool:
        """Whether a round takes no update any more."""
        query = select(notes.c.facts).where(notes.c.federation == self.id)
        states = query.where(notes.c.event == "state").order_by(notes.c.id.desc()).limit(LAST)
        ends = query.where(notes.c.event == "round").order_by(notes.c.id.desc()).limit(1)
        if any(facts["round"] >= number for facts in connection.scalars(ends)):
            return True
        rows = connection.scalars(states)
        return any(facts["round"] == number and facts["state"] in CLOSED for facts in rows)

    def _check_quota(self, size_bytes: int) -> None:
        if self._quota_bytes is None:
            return
        held = self._held_bytes()
        if held + size_bytes > self._quota_bytes:
            raise FullError(
                f"the quota of {self.name} is full: {held} of {self._quota_bytes} bytes are "
                f"held and {size_bytes} more do not fit; raise store.quota_mb, or set "
                "store.keep_rounds"
            )

    def _held_bytes(self) -> int:
        query = (
            select(func.coalesce(func.sum(artifacts.c.size_bytes), 0))
            .join(federations)
            .where(federations.c.name == self.name)
        )
        return self._read(lambda connection: int(connection.scalar(query) or 0))

    def _open(self, connection: Connection, round_number: int) -> None:
        """Refuse to end a round that is over."""
        query = select(func.max(publications.c.round)).where(publications.c.federation == self.id)
        last = connection.scalar(query)
        if last is not None and last >= round_number:
            raise TakenError(f"round {last} has published already")

    def _end(self, connection: Connection, facts: dict[str, Any], added: Sequence[bytes]) -> None:
        """Note a round's end, and add receipts to the chain."""
        self._add(connection, notes, {"event": "round", "facts": facts})
        place, last = self._last(connection) if added else (0, None)
        for number, data in enumerate(added, start=place + 1):
            read = following(data, last)
            row = {
                "number": number, "round": read.round, "kind": str(read.kind),
                "hash": receipt_hash(data), "content": data.decode(),
            }  # fmt: skip
            if not self._add(connection, receipts, row, once=True):
                raise TakenError(f"receipt {number} was written by another process meanwhile")
            if read.output is not None:
                self._hold(connection, read.output.artifact, read.output.size_bytes)
            last = data

    def _last(self, connection: Connection) -> tuple[int, bytes | None]:
        """The newest receipt and its place; 0 and None before the first."""
        query = (
            select(receipts.c.number, receipts.c.content)
            .where(receipts.c.federation == self.id)
            .order_by(receipts.c.number.desc())
            .limit(1)
        )
        row = connection.execute(query).first()
        return (0, None) if row is None else (row.number, row.content.encode())

    def _hold(self, connection: Connection, digest: str, size_bytes: int) -> None:
        row = {"digest": digest, "size_bytes": size_bytes}
        self._add(connection, artifacts, row, once=True, timed=False)

    def _add(
        self,
        connection: Connection,
        table: Table,
        row: dict[str, Any],
        *,
        once: bool = False,
        timed: bool = True,
    ) -> bool:
        """Add a row of this federation; False when ``once`` and its key is taken."""
        row = {"federation": self.id, **row}
        if timed:
            row["time"] = _time_of(connection)
        if not once:
            connection.execute(insert(table), row)
            return True
        return insert_once(connection, table, row)

    def _select(self, table: Table) -> Select[Any]:
        hidden = ("federation", "time", "id")
        columns = [column for column in table.c if column.name not in hidden]
        return select(*columns).where(table.c.federation == self.id)

    def _rows(self, query: Select[Any]) -> list[dict[str, Any]]:
        return self._read(
            lambda connection: [dict(row._mapping) for row in connection.execute(query)]
        )

    def _read(self, work: Callable[[Connection], T]) -> T:
        def tried(again: bool) -> T:
            with self.engine.connect() as connection:
                return work(connection)

        return self._patient(tried)

    def _write(
        self, work: Callable[[Connection], T], table: Table | None = None, done: T | None = None
    ) -> T:
        """Do work in one transaction, and over again when the database is lost.

        Args:
            work: What is done.
            table: Where its first row is added, whose time tells whether it was committed when
                the connection was lost; None where it may be done twice.
            done: What it returned then.
        """
        options = {"time_s": time.time()}

        def tried(again: bool) -> T:
            with refusing_when_full(self.engine), self._writer.begin() as connection:
                connection.execution_options(**options)
                if connection.dialect.name == "postgresql" and hasattr(self, "id"):
                    # As SQLite does: what happens in a federation has one order.
                    connection.execute(select(func.pg_advisory_xact_lock(LOCK, self.id)))
                if again and table is not None and self._holds(connection, table, **options):
                    return cast(T, done)
                return work(connection)

        return self._patient(tried)

    def _holds(self, connection: Connection, table: Table, time_s: float) -> bool:
        """Whether there is a row of this moment."""
        query = select(exists().where(table.c.federation == self.id, table.c.time == time_s))
        return bool(connection.scalar(query))


def _time_of(connection: Connection) -> float:
    """The moment of the work under way: all of its rows have it, however often it is tried."""
    return float(connection.get_execution_options()["time_s"])

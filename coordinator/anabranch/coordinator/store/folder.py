"""A store in a folder: content-addressed artifacts and one append-only journal.

``metrics.jsonl`` is both the journal and what people plot: a line per event, written before
the call returns. Lines that stand or fall together say how many of them follow. A line torn by a
crash, and those that need it, are dropped with the next write.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.coordinator.store.artifacts import NO_ROOM, FolderArtifacts, flush_folder, full
from anabranch.coordinator.store.base import (
    CLOSED,
    SECRET_EVENT,
    Contribution,
    Happening,
    Publication,
    Refusal,
    Store,
    TakenError,
    following,
)
from anabranch.wire.receipt import receipt_hash

JOURNAL = "metrics.jsonl"
ARTIFACTS = "artifacts"
FOLLOW = "follow"
"""How many more lines were written with this one; without one of them it does not count."""


class FolderStore(Store):
    """Keeps a federation in one folder; one process writes at a time.

    Args:
        folder: Made when missing; an earlier run's journal in it is read back.
        durable: Flush every write to the disk itself, so that a power failure loses nothing. A
            killed process loses nothing either way.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._durable = durable
        self._artifacts = FolderArtifacts(folder / ARTIFACTS, durable=durable)
        self._journal = folder / JOURNAL
        self._rows, self._whole_bytes = _read_journal(self._journal)
        self._admitted = {
            (row["round"], row["client"]) for row in self._rows if row["event"] == "admitted"
        }

    def put(self, data: bytes) -> str:  # noqa: D102
        return self._artifacts.put(data)

    def get(self, digest: str) -> bytes:  # noqa: D102
        return self._artifacts.get(digest)

    def admit(self, contribution: Contribution) -> bool:  # noqa: D102
        key = (contribution.round, contribution.client)
        if key in self._admitted:
            return False
        self._append(("admitted", contribution.model_dump()))
        self._admitted.add(key)
        return True

    def admit_collecting(self, contribution: Contribution) -> bool:  # noqa: D102
        number = contribution.round
        states = [row for row in self.notes("state") if row["round"] == number]
        over = any(row["round"] >= number for row in self.notes("round"))
        if over or any(row["state"] in CLOSED for row in states):
            raise TakenError(f"round {number} takes no update any more")
        return self.admit(contribution)

    def refuse(self, refusal: Refusal) -> None:  # noqa: D102
        self._append(("refused", refusal.model_dump()))

    def contributions(self, round_number: int | None = None) -> list[Contribution]:  # noqa: D102
        rows = [row for row in self.notes("admitted") if round_number in (None, row["round"])]
        found = (Contribution(**row) for row in rows)
        return sorted(found, key=lambda row: (row.round, row.client))

    def refusals(self, round_number: int | None = None) -> list[Refusal]:  # noqa: D102
        rows = [row for row in self.notes("refused") if round_number in (None, row["round"])]
        return [Refusal(**row) for row in rows]

    def publish(  # noqa: D102
        self, publication: Publication, facts: dict[str, Any], receipts: Sequence[bytes] = ()
    ) -> None:
        self._end(publication.round, facts, receipts, ("published", publication.model_dump()))

    def abandon(  # noqa: D102
        self, round_number: int, facts: dict[str, Any], receipt: bytes
    ) -> None:
        self._end(round_number, facts, (receipt,))

    def receipts(self) -> list[bytes]:  # noqa: D102
        return [row["content"].encode() for row in self.notes("receipt")]

    def last_receipt(self) -> bytes | None:  # noqa: D102
        rows = self.notes("receipt")
        return rows[-1]["content"].encode() if rows else None

    def tag(self, name: str, round_number: int | None) -> None:  # noqa: D102
        published = {row["round"] for row in self.notes("published")}
        if round_number is not None and round_number not in published:
            raise KeyError(f"round {round_number} has published nothing")
        self._append(("tag", {"name": name, "round": round_number}))

    def tags(self) -> dict[str, int]:  # noqa: D102
        last = {row["name"]: row["round"] for row in self.notes("tag")}
        return {name: last[name] for name in sorted(last) if last[name] is not None}

    def publications(self) -> list[Publication]:  # noqa: D102
        return [Publication(**row) for row in self.notes("published")]

    def latest(self) -> Publication | None:  # noqa: D102
        rows = self.notes("published")
        return Publication(**rows[-1]) if rows else None

    def note(self, event: str, facts: dict[str, Any]) -> None:  # noqa: D102
        self._append((event, facts))

    def notes(self, event: str) -> list[dict[str, Any]]:  # noqa: D102
        return [
            {key: value for key, value in row.items() if key not in ("event", "time")}
            for row in self._rows
            if row["event"] == event
        ]

    def history(self, after: int = 0, most: int = 1000) -> list[Happening]:  # noqa: D102
        rows = self._rows[after : after + most]
        return [
            Happening(
                cursor=cursor,
                time_s=row["time"],
                event=row["event"],
                facts={key: value for key, value in row.items() if key not in ("event", "time")},
            )
            for cursor, row in enumerate(rows, start=after + 1)
            if row["event"] != SECRET_EVENT
        ]

    def tidy(self) -> int:
        """Nothing: a journal's folder is kept, or deleted, as a whole."""
        return 0

    def close(self) -> None:
        """Nothing: no file is open between two calls."""

    def _end(
        self,
        round_number: int,
        facts: dict[str, Any],
        receipts: Sequence[bytes],
        *events: tuple[str, dict[str, Any]],
    ) -> None:
        latest = self.latest()
        if latest is not None and latest.round >= round_number:
            raise TakenError(f"round {latest.round} has published already")
        last, rows = self.last_receipt(), [*events, ("round", facts)]
        for data in receipts:
            read = following(data, last)
            row = {"round": read.round, "kind": read.kind, "hash": receipt_hash(data)}
            rows.append(("receipt", {**row, "content": data.decode()}))
            last = data
        self._append(*rows)

    def _append(self, *events: tuple[str, dict[str, Any]]) -> None:
        now = round(time.time(), 3)
        rows = [{"event": event, "time": now, **facts} for event, facts in events]
        # A process may be killed between any two bytes of one write.
        left = reversed(range(len(rows)))
        lines = "".join(
            json.dumps(row | {FOLLOW: after} if after else row) + "\n"
            for row, after in zip(rows, left, strict=True)
        ).encode()
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("ab", buffering=0) as file:
            # Only a writer drops a torn line: to a reader it is a line that is being written.
            whole = self._whole_bytes if self._whole_bytes >= 0 else file.tell()
            if file.tell() > whole:
                file.truncate(whole)
            self._whole_bytes = -1
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
                if self._durable:
                    os.fsync(file.fileno())
            except OSError as error:
                file.truncate(whole)
                if error.errno in NO_ROOM:
                    raise full(str(self._journal), error) from error
                raise
        if len(self._rows) == 0 and self._durable:
            flush_folder(self._journal.parent)
        self._rows.extend(rows)


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """What counts of a journal, and how many bytes it is."""
    if not path.exists():
        return [], 0
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    rows = [json.loads(line) for line in lines]
    waiting = [row.pop(FOLLOW, 0) for row in rows]
    while waiting and waiting[-1]:
        for each in (lines, rows, waiting):
            each.pop()
    return rows, sum(map(len, lines))

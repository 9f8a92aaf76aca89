"""A store in a folder: content-addressed artifacts and one append-only journal.

``metrics.jsonl`` is both the journal and what people plot: a line per event, written before
the call returns. A line torn by a crash is dropped with the next write.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from anabranch.coordinator.store.base import Contribution, Publication, Refusal, Store

JOURNAL = "metrics.jsonl"
ARTIFACTS = "artifacts"


class FolderStore(Store):
    """Keeps a federation in one folder; one process writes at a time.

    Args:
        folder: Made when missing; an earlier run's journal in it is read back.
        durable: Flush every write to the disk itself, so that a power failure loses nothing. A
            killed process loses nothing either way.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._durable = durable
        self._artifacts = folder / ARTIFACTS
        self._journal = folder / JOURNAL
        self._rows, self._whole_bytes = _read_journal(self._journal)
        self._admitted = {
            (row["round"], row["client"]) for row in self._rows if row["event"] == "admitted"
        }

    def put(self, data: bytes) -> str:  # noqa: D102
        digest = hashlib.sha256(data).hexdigest()
        # Plain names and calls of the system: a small update's file costs a third of what it would.
        path = str(self._path(digest))
        if not os.path.exists(path):  # noqa: PTH110
            partial = f"{path}.partial"
            number = _create(partial)
            try:
                _write(number, data)
                if self._durable:
                    os.fsync(number)
            finally:
                os.close(number)
            os.replace(partial, path)  # noqa: PTH105
            self._flush_folder(Path(path).parent)
        return digest

    def get(self, digest: str) -> bytes:  # noqa: D102
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError as error:
            raise KeyError(f"no artifact {digest} in {self._artifacts}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"artifact {digest} in {self._artifacts} is damaged: restore a backup")
        return data

    def admit(self, contribution: Contribution) -> bool:  # noqa: D102
        key = (contribution.round, contribution.client)
        if key in self._admitted:
            return False
        self._append("admitted", contribution.model_dump())
        self._admitted.add(key)
        return True

    def refuse(self, refusal: Refusal) -> None:  # noqa: D102
        self._append("refused", refusal.model_dump())

    def contributions(self, round_number: int) -> list[Contribution]:  # noqa: D102
        rows = [row for row in self.notes("admitted") if row["round"] == round_number]
        return sorted((Contribution(**row) for row in rows), key=lambda row: row.client)

    def refusals(self) -> list[Refusal]:  # noqa: D102
        return [Refusal(**row) for row in self.notes("refused")]

    def publish(self, publication: Publication) -> None:  # noqa: D102
        self._append("published", publication.model_dump())

    def latest(self) -> Publication | None:  # noqa: D102
        rows = self.notes("published")
        return Publication(**rows[-1]) if rows else None

    def note(self, event: str, facts: dict[str, Any]) -> None:  # noqa: D102
        self._append(event, facts)

    def notes(self, event: str) -> list[dict[str, Any]]:  # noqa: D102
        return [
            {key: value for key, value in row.items() if key not in ("event", "time")}
            for row in self._rows
            if row["event"] == event
        ]

    def _path(self, digest: str) -> Path:
        return self._artifacts / digest[:2] / digest

    def _append(self, event: str, facts: dict[str, Any]) -> None:
        row = {"event": event, "time": round(time.time(), 3), **facts}
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("ab") as file:
            # Only a writer drops a torn line: to a reader it is a line that is being written.
            if file.tell() > self._whole_bytes and self._whole_bytes >= 0:
                file.truncate(self._whole_bytes)
            self._whole_bytes = -1
            file.write((json.dumps(row) + "\n").encode())
            self._flush(file)
        if len(self._rows) == 0:
            self._flush_folder(self._journal.parent)
        self._rows.append(row)

    def _flush(self, file: BinaryIO) -> None:
        file.flush()
        if self._durable:
            os.fsync(file.fileno())

    def _flush_folder(self, folder: Path) -> None:
        """A new name is safe only once its folder is on the disk too."""
        if self._durable:
            number = os.open(folder, os.O_RDONLY)
            os.fsync(number)
            os.close(number)


def _create(path: str) -> int:
    """A new file's descriptor; its folder is made when missing, and not asked for before."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _write(number: int, data: bytes) -> None:
    """All of the bytes: one call of the system writes 2 GB at most."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(number, rest) :]


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and how many bytes they are."""
    if not path.exists():
        return [], 0
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    rows = [json.loads(line) for line in whole.splitlines() if line]
    return rows, len(whole) + len(newline)

"""The audit log: who did what, and what was refused, each entry chained to the one before it.

A line is one entry in canonical JSON (``wire.canonical``) with its number and, under ``previous``,
the sha256 of the line before it: nothing can be taken out, moved or changed without a trace, but at
the end. Whoever notes the last hash elsewhere holds that too. Loads no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from anabranch.wire.canonical import canonical, parse_canonical
from anabranch.wire.errors import WireError

LINE_BYTES = 16 << 10
TAIL_BYTES = 2 * LINE_BYTES


class AuditLog:
    """An append-only file of entries; several processes may write.

    Args:
        path: Made with the first entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[_Entry] = []
        self._waits, self._writes = threading.Lock(), threading.Lock()

    def append(self, **facts: Any) -> None:
        """Add an entry, which is on the disk when this returns; entries at one time share a flush.

        Raises:
            OSError: It could not be written.
            ValueError: A fact is nothing canonical JSON has, or the entry is too long.
        """
        entry = _Entry({"time_s": round(time.time(), 3), **facts})
        if len(canonical(entry.body)) > LINE_BYTES - 200:
            raise ValueError("an audit entry is too long")
        with self._waits:
            self._waiting.append(entry)
        with self._writes:
            if not entry.done:
                with self._waits:
                    batch, self._waiting = self._waiting, []
                self._write(batch)
        if entry.error is not None:
            raise entry.error

    def entries(self, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Numbers and lines of the entries after one, oldest first."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number > after and line.endswith(b"\n"):
                    yield number, line[:-1]

    def _write(self, batch: list[_Entry]) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._add(file, [entry.body for entry in batch])
        except OSError as error:
            for entry in batch:
                entry.error = error
        for entry in batch:
            entry.done = True

    def _add(self, file: FileIO, bodies: list[dict[str, Any]]) -> None:
        number, previous, whole = _last(self.path)
        if file.tell() > whole:  # a line torn by a crash
            file.truncate(whole)
        lines = []
        for body in bodies:
            number += 1
            line = canonical({**body, "number": number, "previous": previous})
            previous = hashlib.sha256(line).hexdigest()
            lines.append(line + b"\n")
        try:
            rest = memoryview(b"".join(lines))
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise


@dataclass
class _Entry:
    body: dict[str, Any]
    done: bool = False
    error: OSError | None = None


def check_audit(lines: Iterator[bytes]) -> tuple[int, str]:
    """Check that a log is whole from its first entry on.

    Args:
        lines: Its lines, oldest first, without their ends.

    Returns:
        How many entries it has, and the hash of the last.

    Raises:
        WireError: ``chain``: an entry is missing, moved or changed; ``json`` or ``canonical``.
    """
    number, previous = 0, ""
    for number, line in enumerate(lines, start=1):
        entry = parse_canonical(line, LINE_BYTES)
        if not isinstance(entry, dict) or entry.get("number") != number:
            raise WireError("chain", f"entry {number} is not the one that was written there")
        if entry.get("previous") != previous:
            raise WireError("chain", f"entry {number} does not follow the one before it")
        previous = hashlib.sha256(line).hexdigest()
    return number, previous


def _last(path: Path) -> tuple[int, str, int]:
    """Number and hash of the last whole entry, and where it ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = max(0, size - TAIL_BYTES)
        file.seek(start)
        tail = file.read()
    whole, newline, _ = tail.rpartition(b"\n")
    if not newline:
        return 0, "", 0
    line = whole.rpartition(b"\n")[2]
    number = parse_canonical(line, LINE_BYTES)["number"]
    return number, hashlib.sha256(line).hexdigest(), start + len(whole) + 1

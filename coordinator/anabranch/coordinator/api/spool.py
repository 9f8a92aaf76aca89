"""Uploads on their way: bytes on disk, so that a connection that ends costs nothing but time."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from anabranch.coordinator.store import FullError
from anabranch.coordinator.store.artifacts import NO_ROOM

PARTIAL = ".partial"


@dataclass(frozen=True)
class Wanted:
    """An update that is to come.

    Attributes:
        federation: Of which federation.
        client: Of whom.
        round: Of which round.
        digest: sha256 of its bytes, in hexadecimal.
        size_bytes: How many they are.
    """

    federation: str
    client: str
    round: int
    digest: str
    size_bytes: int


class Spool:
    """A folder of unfinished uploads, at most one per federation and client.

    No name that a peer gave is part of a path: files are named by hashes.

    Args:
        folder: Made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def offset(self, wanted: Wanted) -> int:
        """How many bytes of it are here."""
        try:
            size = self._path(wanted).stat().st_size
        except FileNotFoundError:
            return 0
        return size if size <= wanted.size_bytes else 0

    def begin(self, wanted: Wanted) -> int:
        """Make ready for its bytes: what its client sent of another one is dropped.

        Returns:
            How many bytes of it are here.
        """
        path = self._path(wanted)
        for other in self._folder.glob(f"{_owner(wanted)}-*{PARTIAL}"):
            if other != path:
                other.unlink(missing_ok=True)
        offset = self.offset(wanted)
        if offset == 0:
            path.unlink(missing_ok=True)
        return offset

    def add(self, wanted: Wanted, data: bytes, offset: int) -> None:
        """Add bytes at an offset, the file's end.

        Raises:
            FullError: There is no room.
        """
        path = self._path(wanted)
        try:
            number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                rest = memoryview(data)
                while rest:
                    written = os.pwrite(number, rest, offset)
                    rest, offset = rest[written:], offset + written
            finally:
                os.close(number)
        except OSError as error:
            if error.errno in NO_ROOM or error.errno == errno.ENOSPC:
                raise FullError(f"there is no room for uploads: {error.strerror}") from error
            raise

    def finish(self, wanted: Wanted) -> bytes | None:
        """All its bytes; None, and they are dropped, where their sha256 is another one."""
        data = self._path(wanted).read_bytes()
        if len(data) == wanted.size_bytes and hashlib.sha256(data).hexdigest() == wanted.digest:
            return data
        self.drop(wanted)
        return None

    def drop(self, wanted: Wanted) -> None:
        """Forget it."""
        self._path(wanted).unlink(missing_ok=True)

    def sweep(self, older_s: float) -> int:
        """Delete what nobody went on with for so long; returns how many files."""
        count, now = 0, time.time()
        for path in self._folder.glob(f"*{PARTIAL}"):
            try:
                if now - path.stat().st_mtime >= older_s:
                    path.unlink()
                    count += 1
            except FileNotFoundError:
                continue
        return count

    def _path(self, wanted: Wanted) -> Path:
        return self._folder / f"{_owner(wanted)}-{_hash(str(wanted))}{PARTIAL}"


def _owner(wanted: Wanted) -> str:
    return _hash(f"{wanted.federation}\0{wanted.client}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

"""Uploads on their way: bytes on disk, so that a connection that ends costs nothing but time."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from anabranch.coordinator.store import FullError
from anabranch.coordinator.store.artifacts import NO_ROOM

PARTIAL = ".partial"
READ_BYTES = 1 << 20


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


class Arrival:
    """An update's file while its bytes come; each is hashed once, as it does.

    Args:
        path: The file; what it holds already is read again.

    Attributes:
        path: The file.
        offset: Bytes that are here.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self._hash, self._lock = hashlib.sha256(), threading.Lock()
        self._number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        while part := os.pread(self._number, READ_BYTES, self.offset):
            self._hash.update(part)
            self.offset += len(part)

    def add(self, data: bytes) -> None:
        """Add bytes at the end.

        Raises:
            FullError: There is no room.
        """
        with self._lock:
            if self._number < 0:
                raise ValueError("the upload has ended")
            rest, at = memoryview(data), self.offset
            try:
                while rest:
                    written = os.pwrite(self._number, rest, at)
                    rest, at = rest[written:], at + written
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise FullError(f"there is no room for uploads: {error.strerror}") from error
                raise
            self._hash.update(data)
            self.offset = at

    def holds(self, wanted: Wanted) -> bool:
        """Whether it is all there, and what was announced."""
        return self.offset == wanted.size_bytes and self._hash.hexdigest() == wanted.digest

    def read(self) -> bytes:
        """All its bytes."""
        return self.path.read_bytes()

    def close(self) -> None:
        """Close the file, which stays; a thread that is still at ``add`` is waited for.

        The next upload of the same update may write it then.
        """
        with self._lock:
            if self._number >= 0:
                os.close(self._number)
                self._number = -1


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

    def begin(self, wanted: Wanted) -> Arrival:
        """Make ready for its bytes: what its client sent of another one is dropped."""
        path = self._path(wanted)
        for other in self._folder.glob(f"{_owner(wanted)}-*{PARTIAL}"):
            if other != path:
                other.unlink(missing_ok=True)
        if self.offset(wanted) == 0:
            path.unlink(missing_ok=True)
        return Arrival(path)

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

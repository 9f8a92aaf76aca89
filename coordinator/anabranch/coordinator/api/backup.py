"""The API's own state in one file: its authority, who is enrolled, the audit log.

The authority's key is in it, or every peer would have to enrol again: the file is its owner's
alone. Uploads that are under way are not; who sent them sends them again. Loads no torch.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from anabranch.coordinator.api.audit import AuditLog, check_audit
from anabranch.coordinator.api.authority import CA_CERTIFICATE, CA_KEY, Authority
from anabranch.coordinator.store.archive import add_bytes, new_archive, new_folder
from anabranch.wire.errors import WireError

TOP = "api"
"""Folder of the tar, by which it is known."""
PEERS, AUDIT = "peers.db", "audit.jsonl"
PRIVATE = 0o600
BLOCK = 1 << 20


@dataclass(frozen=True)
class StateBackup:
    """What a backup of an API's state holds.

    Attributes:
        certificates: How many were issued.
        entries: Of the audit log.
        last_hash: sha256 of its last entry; empty where there is none.
    """

    certificates: int
    entries: int
    last_hash: str


def holds_state(file: Path) -> bool:
    """Whether a tar is a backup of an API's state, and not of a federation."""
    try:
        with tarfile.open(file) as tar:
            first = tar.next()
    except (tarfile.TarError, EOFError):
        return False
    return first is not None and first.name.startswith(f"{TOP}/")


def backup_state(state: Path, out: Path) -> StateBackup:
    """Write an API's state while it goes on: a register of one moment, a log of whole entries.

    Args:
        state: Its folder.
        out: The tar to write, for its owner alone; it appears when it is whole.

    Raises:
        ValueError: The file exists, the folder holds no state, or it is damaged.
    """
    for name in (CA_KEY, CA_CERTIFICATE, PEERS):
        if not (state / name).is_file():
            raise ValueError(f"{state}: holds no {name}; name the configuration of an API that ran")
    with new_archive(out, private=True) as tar:
        for name in (CA_KEY, CA_CERTIFICATE):
            add_bytes(tar, f"{TOP}/{name}", (state / name).read_bytes(), PRIVATE)
        # The log comes last: of what the register knows it lacks calls under way alone.
        data, certificates = _register(state / PEERS)
        add_bytes(tar, f"{TOP}/{PEERS}", data, PRIVATE)
        entries, last_hash = _add_log(tar, state / AUDIT)
    return StateBackup(certificates, entries, last_hash)


def restore_state(file: Path, state: Path) -> StateBackup:
    """Make the folder of an API's state from a backup.

    Args:
        file: What ``backup_state`` wrote.
        state: Made; where there is one, it is empty.

    Raises:
        ValueError: Something is in the way, or the file is damaged or no such backup.
    """
    try:
        with new_folder(state) as partial, tarfile.open(file) as tar:
            partial.mkdir(mode=0o700, parents=True)
            _extract(tar, partial)
            Authority(partial)
            found = _checked(partial)
    except (tarfile.TarError, EOFError, WireError, sqlite3.DatabaseError) as error:
        raise ValueError(f"{file}: is damaged or no backup: {error}") from error
    return found


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the files of a state, and nothing else that a tar may name."""
    left = {f"{TOP}/{name}": name for name in (CA_KEY, CA_CERTIFICATE, PEERS, AUDIT)}
    for member in tar:
        if not member.isfile() or member.name not in left:
            raise tarfile.TarError(f"{member.name[:100]!r} is not of an API's state")
        path, stream = folder / left.pop(member.name), tar.extractfile(member)
        assert stream is not None
        number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE)
        with os.fdopen(number, "wb") as out:
            while data := stream.read(BLOCK):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
    if left:
        raise tarfile.TarError(f"it lacks {', '.join(left.values())}")


def _checked(folder: Path) -> StateBackup:
    """What a restored folder holds.

    Raises:
        WireError: The audit log is not whole.
        sqlite3.DatabaseError: The register is damaged.
    """
    with closing(sqlite3.connect(folder / PEERS)) as base:
        (told,) = base.execute("pragma quick_check(1)").fetchone()
        if told != "ok":
            raise sqlite3.DatabaseError(f"{PEERS}: {told}")
        certificates = _count(base)
    log = AuditLog(folder / AUDIT)
    return StateBackup(certificates, *check_audit(line for _, line in log.entries()))


def _register(path: Path) -> tuple[bytes, int]:
    """A SQLite file as of one moment, whoever writes to it."""
    with closing(sqlite3.connect(path, timeout=30)) as base, closing(_memory()) as copy:
        base.backup(copy)
        return copy.serialize(), _count(copy)


def _memory() -> sqlite3.Connection:
    return sqlite3.connect(":memory:")


def _count(base: sqlite3.Connection) -> int:
    (count,) = base.execute("select count(*) from certificates").fetchone()
    return int(count)


def _add_log(tar: tarfile.TarFile, path: Path) -> tuple[int, str]:
    """Add the whole entries of an audit log, and check their chain."""
    member = tarfile.TarInfo(f"{TOP}/{AUDIT}")
    member.mode = PRIVATE
    if not path.exists():
        tar.addfile(member)
        return 0, ""
    with path.open("rb") as file:
        # Writers hold it while they add lines; what is whole by now is never changed again.
        fcntl.flock(file, fcntl.LOCK_SH)
        member.size = sum(len(line) for line in file if line.endswith(b"\n"))
        fcntl.flock(file, fcntl.LOCK_UN)
        try:
            found = check_audit(_lines(file, member.size))
        except WireError as error:
            raise ValueError(
                f"{path}: is not whole ({error}); restore an earlier backup"
            ) from error
        file.seek(0)
        tar.addfile(member, file)
    return found


def _lines(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    """The lines of a log up to a size."""
    file.seek(0)
    for line in file:
        if size_bytes <= 0:
            return
        size_bytes -= len(line)
        yield line[:-1]

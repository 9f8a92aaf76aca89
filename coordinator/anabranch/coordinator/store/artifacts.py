"""Artifacts: bytes kept under their sha256, in a folder or in a bucket. Loads no torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anabranch.coordinator.store.base import FullError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when a disk, a user's share of it or a file is full."""
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
PARTIAL = ".partial"
_APART_S = time.time() - time.monotonic()


class Artifacts(ABC):
    """Bytes by their sha256: whole or not there, and never changed."""

    place: str
    """Where they are, for people."""

    @abstractmethod
    def put(self, data: bytes) -> str:
        """Keep bytes and return their digest.

        Raises:
            FullError: There is no room; nothing is left behind.
        """

    def put_file(self, path: Path, digest: str) -> str:
        """``put`` of what a file holds; the file is gone when this returns.

        Args:
            path: Nobody else writes it any more.
            digest: sha256 of its bytes, which the caller has taken.

        Raises:
            FullError: There is no room; the file is still there.
        """
        kept = self.put(path.read_bytes())
        path.unlink()
        return kept

    @abstractmethod
    def size(self, digest: str) -> int:
        """Bytes of an artifact.

        Raises:
            KeyError: No such artifact.
        """

    @abstractmethod
    def time_s(self, digest: str) -> float:
        """When it was put last, in Unix seconds, by the clock of where it is.

        Raises:
            KeyError: No such artifact.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an artifact or a remnant; nothing happens when there is none."""

    @abstractmethod
    def names(self) -> Iterator[tuple[str, float]]:
        """Everything kept, remnants of killed writers too: name and seconds since it was put."""

    @abstractmethod
    def _read(self, digest: str) -> bytes:
        """The bytes as they are; FileNotFoundError when there are none."""

    def get(self, digest: str) -> bytes:
        """The bytes of an artifact.

        Raises:
            KeyError: No such artifact.
            ValueError: Its bytes no longer match the digest.
        """
        try:
            data = self._read(digest)
        except FileNotFoundError as error:
            raise self._missing(digest) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"artifact {digest} in {self.place} is damaged: restore a backup")
        return data

    def _missing(self, digest: str) -> KeyError:
        return KeyError(f"no artifact {digest} in {self.place}")


class FolderArtifacts(Artifacts):
    """Artifacts as files.

    Args:
        folder: Made with the first artifact.
        durable: Flush each to the disk itself, and its name too.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable
        self.place = str(folder)

    def put(self, data: bytes) -> str:  # noqa: D102
        digest = hashlib.sha256(data).hexdigest()
        # Plain names and calls of the system: a small update's file costs a third of what it would.
        path = str(self._path(digest))
        if not self._refresh(path, data):
            partial = f"{path}.{os.getpid()}{PARTIAL}"
            try:
                self._write(partial, data)
                os.replace(partial, path)  # noqa: PTH105
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(partial)  # noqa: PTH108
                if error.errno in NO_ROOM:
                    raise full(self.place, error) from error
                raise
            if self._durable:
                flush_folder(Path(path).parent)
        return digest

    def put_file(self, path: Path, digest: str) -> str:  # noqa: D102
        # The file itself becomes the artifact, where it lies on the same file system.
        target = self._path(digest)
        try:
            _make_folder(target.parent, self._durable)
            if self._durable:
                flush(path)
            path.replace(target)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return super().put_file(path, digest)
            if error.errno in NO_ROOM:
                raise full(self.place, error) from error
            raise
        if self._durable:
            flush_folder(target.parent)
        return digest

    def _refresh(self, path: str, data: bytes) -> bool:
        """Make what is there as good as new; False when nothing is, or something else."""
        try:
            # No collection of garbage takes it for an old remnant.
            os.utime(path)
            # A disk may have lost or turned some of its bits: it is written again then.
            return Path(path).read_bytes() == data
        except FileNotFoundError:
            return False

    def size(self, digest: str) -> int:  # noqa: D102
        return self._stat(digest).st_size

    def time_s(self, digest: str) -> float:  # noqa: D102
        return self._stat(digest).st_mtime

    def delete(self, name: str) -> None:  # noqa: D102
        self._path(name).unlink(missing_ok=True)

    def names(self) -> Iterator[tuple[str, float]]:  # noqa: D102
        now = _now_s()
        for path in sorted(self._folder.glob("[0-9a-f][0-9a-f]/*")):
            with contextlib.suppress(FileNotFoundError):
                yield path.name, now - path.stat().st_mtime

    def _stat(self, digest: str) -> os.stat_result:
        try:
            return self._path(digest).stat()
        except FileNotFoundError as error:
            raise self._missing(digest) from error

    def _read(self, digest: str) -> bytes:
        return self._path(digest).read_bytes()

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest

    def _write(self, path: str, data: bytes) -> None:
        number = _create(path, self._durable)
        try:
            # One call of the system writes 2 GB at most.
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(number, rest) :]
            if self._durable:
                os.fsync(number)
        finally:
            os.close(number)


class S3Artifacts(Artifacts):
    """Artifacts as objects of a bucket: S3 shows an object whole or not at all.

    Args:
        url: ``s3://BUCKET/PREFIX``.

    Raises:
        ValueError: The client of S3 is not installed, or the bucket cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            import s3fs  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{url}: needs s3fs, which is not installed; pip install 'anabranch[s3]'"
            ) from error
        import fsspec

        self.place = url.rstrip("/")
        filesystem, root = fsspec.core.url_to_fs(self.place, use_listings_cache=False)
        self._files: Any = filesystem
        self._root: str = root
        try:
            self._files.ls(root.split("/")[0])
        except OSError as error:
            raise ValueError(f"{self.place}: the bucket cannot be used: {error}") from error

    def put(self, data: bytes) -> str:  # noqa: D102
        digest = hashlib.sha256(data).hexdigest()
        # Sent again even when it is there, as good as new to a collection of garbage.
        self._files.pipe_file(self._path(digest), data)
        return digest

    def size(self, digest: str) -> int:  # noqa: D102
        return int(self._info(digest)["size"])

    def time_s(self, digest: str) -> float:  # noqa: D102
        return float(self._info(digest)["LastModified"].timestamp())

    def delete(self, name: str) -> None:  # noqa: D102
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def names(self) -> Iterator[tuple[str, float]]:  # noqa: D102
        now = _now_s()
        for path, facts in sorted(self._files.find(self._root, detail=True).items()):
            yield path.rsplit("/", 1)[-1], now - facts["LastModified"].timestamp()

    def _info(self, digest: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._files.info(self._path(digest))
        except FileNotFoundError as error:
            raise self._missing(digest) from error
        return found

    def _read(self, digest: str) -> bytes:
        return bytes(self._files.cat_file(self._path(digest)))

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}"


def _now_s() -> float:
    """Unix seconds, but for hours by which somebody has set the clock forward since the start.

    What is on its way to a row would look old, and go with the garbage.
    """
    return min(time.time(), time.monotonic() + _APART_S)


def full(place: str, error: object) -> FullError:
    """The refusal of what there is no room for."""
    return FullError(f"{place} has no room: {error}; free some, and go on from what is kept")


def flush_folder(folder: Path) -> None:
    """A new name is safe only once its folder is on the disk too."""
    flush(folder)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _create(path: str, durable: bool) -> int:
    """A new file's descriptor; its folder is made when missing, and not asked for before."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        _make_folder(Path(path).parent, durable)
        return os.open(path, flags, 0o666)


def _make_folder(folder: Path, durable: bool) -> None:
    """Make a folder that is missing, so that it lasts."""
    if folder.exists():
        return
    root = next(parent for parent in folder.parents if parent.exists())
    folder.mkdir(parents=True, exist_ok=True)
    if durable:
        for parent in folder.parents:
            flush_folder(parent)
            if parent == root:
                break

"""Files and folders that appear when they are whole: what backups are written to and read into."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.coordinator.store.artifacts import flush_folder


@contextmanager
def new_archive(out: Path, *, private: bool = False) -> Iterator[tarfile.TarFile]:
    """A tar to fill; it has its name once the block has ended well.

    Args:
        out: The tar.
        private: Nobody but its owner may read it.

    Raises:
        ValueError: There is such a file.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already; name another file")
    partial = out.with_name(f"{out.name}.partial")
    partial.unlink(missing_ok=True)
    number = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666)
    try:
        with os.fdopen(number, "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                yield tar
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
        flush_folder(out.absolute().parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place aside to restore into; it becomes the folder once the block has ended well.

    Raises:
        ValueError: There is such a folder, and something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; name a new folder")
    partial = folder.with_name(f".{folder.name}.restoring")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        # In the place of an empty one too.
        partial.rename(folder)
        flush_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def add_bytes(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    """Add bytes under a name."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))

"""A folder that appears under its name whole, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path, partial: Path | None = None) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends without an error.

    Args:
        folder: What does not exist yet, or is empty: files of others are never replaced.
        partial: The hidden folder, where others must know it before it is made; from
            ``hidden_beside``.

    Yields:
        A hidden folder beside it.

    Raises:
        ValueError: The folder holds files.
        OSError: The disk refuses.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already; name a new folder, or remove this one first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = hidden_beside(folder) if partial is None else partial
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(folder.parent)


def hidden_beside(folder: Path) -> Path:
    """A new hidden name on the same file system, from which a rename is one step."""
    return folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"


def begun(folder: Path) -> set[Path]:
    """The hidden folders of ``new_folder`` that have not taken this name, and may be left over."""
    digits = "[0-9a-f]" * 8
    return set(folder.parent.glob(f".{glob.escape(folder.name)}.{digits}"))


def write_text(path: Path, text: str) -> None:
    """Write a new file and wait until it is on disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make what a folder lists last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

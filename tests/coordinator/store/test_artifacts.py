from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.coordinator.store.artifacts import Artifacts, FolderArtifacts, S3Artifacts


@pytest.fixture(params=["folder", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "folder":
        return FolderArtifacts(tmp_path / "artifacts")
    return S3Artifacts(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


def test_bytes_come_back_by_their_hash(artifacts: Artifacts) -> None:
    assert list(artifacts.names()) == []
    large = os.urandom(6 << 20)
    for data in (b"", b"abc", large):
        digest = artifacts.put(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert artifacts.put(data) == digest
        assert artifacts.get(digest) == data
        assert artifacts.size(digest) == len(data)
    found = dict(artifacts.names())
    assert set(found) == {hashlib.sha256(data).hexdigest() for data in (b"", b"abc", large)}
    assert all(-5 < age_s < 60 for age_s in found.values())


def test_what_was_deleted_is_missing(artifacts: Artifacts) -> None:
    digest = artifacts.put(b"abc")
    for _ in range(2):
        artifacts.delete(digest)
    missing: tuple[Callable[[str], object], ...] = (artifacts.get, artifacts.size)
    for ask in missing:
        with pytest.raises(KeyError, match=f"no artifact {digest} in .*artifacts|prefix"):
            ask(digest)


def test_putting_again_makes_it_young_again(tmp_path: Path) -> None:
    artifacts = FolderArtifacts(tmp_path)
    path = tmp_path / "ba" / artifacts.put(b"abc")
    os.utime(path, (0, 0))
    assert dict(artifacts.names())[path.name] > 1e9
    artifacts.put(b"abc")
    assert dict(artifacts.names())[path.name] < 60


def test_a_bucket_that_is_not_there_is_said_so(bucket: str) -> None:
    with pytest.raises(ValueError, match=r"s3://nowhere/x: the bucket cannot be used: .*not exist"):
        S3Artifacts("s3://nowhere/x")


@pytest.mark.parametrize("damaged", [b"ab", b"abd", b""])
def test_putting_again_mends_what_a_disk_has_lost(tmp_path: Path, damaged: bytes) -> None:
    artifacts = FolderArtifacts(tmp_path)
    digest = artifacts.put(b"abc")
    (tmp_path / "ba" / digest).write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged: restore a backup"):
        artifacts.get(digest)
    assert artifacts.put(b"abc") == digest
    assert artifacts.get(digest) == b"abc"


def test_a_clock_that_is_set_forward_makes_nothing_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, right = FolderArtifacts(tmp_path), time.time
    artifacts.put(b"abc")
    for hours in (6, -6):
        monkeypatch.setattr(time, "time", lambda hours=hours: right() + 3600 * hours)
        assert max(age_s for _, age_s in artifacts.names()) < 60

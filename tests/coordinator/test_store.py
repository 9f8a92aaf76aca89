from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.coordinator.store import Contribution, FolderStore, Publication, Refusal


def contribution(server_round: int, client: str, digest: str = "d") -> Contribution:
    return Contribution(round=server_round, client=client, digest=digest, size_bytes=3)


def test_artifacts_are_kept_once_under_their_hash(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(b"abc")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.put(b"abc") == digest
    assert store.get(digest) == b"abc"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1


def test_a_damaged_artifact_is_not_returned(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    digest = store.put(b"abc")
    next(path for path in tmp_path.rglob(digest)).write_bytes(b"abd")
    with pytest.raises(ValueError, match="damaged"):
        store.get(digest)
    with pytest.raises(KeyError, match="no artifact"):
        store.get("0" * 64)


def test_a_client_counts_once_per_round(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert store.admit(contribution(1, "b"))
    assert not store.admit(contribution(1, "b", "other"))
    assert store.admit(contribution(1, "a"))
    assert store.admit(contribution(2, "b"))
    assert [row.client for row in store.contributions(1)] == ["a", "b"]
    assert store.contributions(1)[1].digest == "d"


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.admit(contribution(1, "a"))
    store.refuse(Refusal(round=1, client="b", code="norm", reason="too large"))
    store.publish(Publication(round=1, digest="x", adapter_hash="h", report={"names": ["a"]}))
    store.note("evaluate", {"round": 1, "client": "a", "accuracy": 0.5})
    again = FolderStore(tmp_path)
    assert not again.admit(contribution(1, "a"))
    assert again.refusals() == [Refusal(round=1, client="b", code="norm", reason="too large")]
    latest = again.latest()
    assert latest is not None
    assert latest.report == {"names": ["a"]}
    assert again.notes("evaluate") == [{"round": 1, "client": "a", "accuracy": 0.5}]


def test_a_line_torn_by_a_crash_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.admit(contribution(1, "a"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "admitted", "round": 1, "cli')
    size = (tmp_path / "metrics.jsonl").stat().st_size
    again = FolderStore(tmp_path)
    assert [row.client for row in again.contributions(1)] == ["a"]
    # A reader leaves the line alone: to it, it may be one that is being written.
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    assert again.admit(contribution(1, "b"))
    assert [row.client for row in FolderStore(tmp_path).contributions(1)] == ["a", "b"]

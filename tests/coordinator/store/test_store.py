"""What every store promises, on each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.coordinator.store import Contribution, FolderStore, Publication, Refusal, Store

Opener = Callable[[], Store]


def contribution(server_round: int, client: str, digest: str = "d") -> Contribution:
    return Contribution(round=server_round, client=client, digest=digest, size_bytes=3)


def publication(store: Store, server_round: int, blob: bytes = b"abc") -> Publication:
    return Publication(
        round=server_round,
        digest=store.put(blob),
        adapter_hash="h" * 64,
        report={"names": ["a"], "similarity": math.nan},
    )


def test_artifacts_are_kept_once_under_their_hash(open_again: Opener, tmp_path: Path) -> None:
    store = open_again()
    digest = store.put(b"abc")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert store.put(b"abc") == digest
    assert store.get(digest) == b"abc"
    assert len([path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]) == 1


def test_a_damaged_artifact_is_not_returned(open_again: Opener, tmp_path: Path) -> None:
    store = open_again()
    digest = store.put(b"abc")
    next(path for path in tmp_path.rglob(digest)).write_bytes(b"abd")
    with pytest.raises(ValueError, match="damaged"):
        store.get(digest)
    with pytest.raises(KeyError, match="no artifact"):
        store.get("0" * 64)


def test_a_client_counts_once_per_round(open_again: Opener) -> None:
    store = open_again()
    assert store.admit(contribution(1, "b"))
    assert not store.admit(contribution(1, "b", "other"))
    assert store.admit(contribution(1, "B"))
    assert store.admit(contribution(2, "a"))
    assert not open_again().admit(contribution(2, "a", "other"))
    assert [row.client for row in store.contributions(1)] == ["B", "b"]
    assert store.contributions(1)[1].digest == "d"
    assert [(row.round, row.client) for row in store.contributions()] == [
        (1, "B"), (1, "b"), (2, "a"),
    ]  # fmt: skip


def test_a_round_publishes_once_and_its_end_is_noted_with_it(open_again: Opener) -> None:
    store = open_again()
    assert store.latest() is None
    first, second = publication(store, 1), publication(store, 2, b"second")
    store.publish(first, {"round": 1, "status": "published"})
    store.publish(second, {"round": 2, "status": "published"})
    with pytest.raises(ValueError, match="round 2 has published already"):
        store.publish(second, {"round": 2, "status": "twice"})
    again = open_again()
    assert [row.round for row in again.publications()] == [1, 2]
    assert again.latest() == again.publications()[1]
    assert [row["status"] for row in again.notes("round")] == ["published"] * 2


def test_everything_is_there_after_a_restart(open_again: Opener) -> None:
    store = open_again()
    store.admit(contribution(1, "a"))
    store.refuse(Refusal(round=1, client="b", code="norm", reason="too large"))
    store.publish(publication(store, 1), {"round": 1})
    store.note("evaluate", {"round": 1, "client": "a", "accuracy": 0.5})
    store.note("evaluate", {"round": 1, "client": "b", "accuracy": None})
    again = open_again()
    assert not again.admit(contribution(1, "a"))
    assert again.refusals() == [Refusal(round=1, client="b", code="norm", reason="too large")]
    latest = again.latest()
    assert latest is not None
    assert latest.report["names"] == ["a"]
    assert math.isnan(latest.report["similarity"])
    assert again.notes("evaluate") == [
        {"round": 1, "client": "a", "accuracy": 0.5},
        {"round": 1, "client": "b", "accuracy": None},
    ]


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

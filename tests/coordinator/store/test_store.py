"""What every store promises, on each of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.coordinator.store import (
    Contribution,
    FolderStore,
    Publication,
    Refusal,
    Store,
    TakenError,
)
from anabranch.wire.receipt import Receipt, check_chain, encode_receipt, receipt_hash

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


def receipt(store: Store, server_round: int, last: bytes | None = None) -> bytes:
    """One that follows the last of the store, or the one given."""
    last = last or store.last_receipt()
    written = Receipt(
        kind="abandoned", federation="f", run="r", round=server_round, time_s=1.5, software="test",
        previous=None if last is None else receipt_hash(last), base_hash="ab" * 32,
        start_hash="cd" * 32, reason="größer als 2\u00b3",
    )  # fmt: skip
    return encode_receipt(written, None)


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
    with pytest.raises(TakenError, match="round 2 has published already"):
        store.publish(second, {"round": 2, "status": "twice"})
    again = open_again()
    assert [row.round for row in again.publications()] == [1, 2]
    assert again.latest() == again.publications()[1]
    assert [row["status"] for row in again.notes("round")] == ["published"] * 2


def test_receipts_are_written_with_what_they_are_about_and_chain(open_again: Opener) -> None:
    store = open_again()
    assert (store.receipts(), store.last_receipt()) == ([], None)
    one = receipt(store, 1)
    store.publish(publication(store, 1), {"round": 1}, [one])
    store.abandon(2, {"round": 2, "status": "abandoned"}, receipt(store, 2))
    again = open_again()
    three = receipt(again, 3)
    again.publish(publication(again, 3), {"round": 3}, [three, receipt(again, 3, three)])
    found = open_again().receipts()
    assert found[0] == one
    assert found[-1] == again.last_receipt()
    assert [row.round for row in check_chain(found, None)] == [1, 2, 3, 3]
    assert [row["round"] for row in again.notes("round")] == [1, 2, 3]


def test_a_receipt_that_does_not_follow_changes_nothing(open_again: Opener) -> None:
    store = open_again()
    one = receipt(store, 1)
    store.publish(publication(store, 1), {"round": 1}, [one])
    row = publication(store, 2, b"second")
    with pytest.raises(TakenError, match="the receipt of round 2 follows None, and the last one"):
        store.publish(row, {"round": 2}, [receipt(FolderStore(Path("none")), 2)])
    with pytest.raises(TakenError, match="the receipt of round 9 follows"):
        store.publish(row, {"round": 2}, [receipt(store, 2), receipt(store, 9)])
    with pytest.raises(TakenError, match="the receipt of round 3 follows"):
        store.abandon(3, {"round": 3}, receipt(store, 3, receipt(store, 2)))
    with pytest.raises(ValueError, match="no object of a receipt"):
        store.abandon(3, {"round": 3}, b"{}")
    again = open_again()
    assert [found.round for found in again.publications()] == [1]
    assert again.receipts() == [one]
    assert [found["round"] for found in again.notes("round")] == [1]


def test_a_round_that_was_overtaken_cannot_be_abandoned(open_again: Opener) -> None:
    store = open_again()
    store.publish(publication(store, 2), {"round": 2})
    for server_round in (1, 2):
        with pytest.raises(TakenError, match="round 2 has published already"):
            store.abandon(server_round, {"round": server_round}, receipt(store, server_round))
    with pytest.raises(TakenError, match="round 2 has published already"):
        store.publish(publication(store, 1, b"late"), {"round": 1})
    assert open_again().receipts() == []


def test_a_tag_stands_for_one_round_until_it_is_moved(open_again: Opener) -> None:
    store = open_again()
    for server_round in (1, 2):
        store.publish(publication(store, server_round), {"round": server_round})
    assert store.tags() == {}
    store.tag("champion", 1)
    store.tag("Ärzte", 1)
    store.tag("B", 2)
    store.tag("champion", 2)
    store.tag("Ärzte", None)
    store.tag("never", None)
    for taken in (store, open_again()):
        assert taken.tags() == {"B": 2, "champion": 2}
    with pytest.raises(KeyError, match="round 3 has published nothing"):
        store.tag("champion", 3)
    assert open_again().tags() == {"B": 2, "champion": 2}


def test_refusals_of_a_round(open_again: Opener) -> None:
    store = open_again()
    for server_round in (1, 2, 1):
        store.refuse(Refusal(round=server_round, client="b", code="norm", reason="x"))
    assert [row.round for row in store.refusals()] == [1, 2, 1]
    assert len(store.refusals(1)) == 2


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


def test_another_process_admits_only_while_a_round_collects(open_again: Opener) -> None:
    store = open_again()
    store.note("state", {"round": 1, "state": "collecting"})
    assert store.admit_collecting(contribution(1, "a"))
    assert not store.admit_collecting(contribution(1, "a", "other"))
    store.note("state", {"round": 1, "state": "merging"})
    with pytest.raises(TakenError, match="round 1 takes no update any more"):
        store.admit_collecting(contribution(1, "b"))
    assert store.admit(contribution(1, "b"))
    assert store.admit_collecting(contribution(2, "a"))
    # A rollback takes the number of the round that was collecting.
    store.publish(publication(store, 2), {"round": 2, "status": "rolled-back"})
    with pytest.raises(TakenError, match="round 2"):
        store.admit_collecting(contribution(2, "b"))


def test_what_happened_is_read_from_a_cursor_on(open_again: Opener) -> None:
    store = open_again()
    store.note("planned", {"round": 1, "asked": ["a", "b"]})
    store.admit(contribution(1, "a"))
    store.refuse(Refusal(round=1, client="b", code="norm", reason="too large"))
    assert store.last_note("planned") == {"round": 1, "asked": ["a", "b"]}
    assert store.last_note("state") is None
    found = open_again().history()
    assert [row.event for row in found] == ["planned", "admitted", "refused"]
    assert found[1].facts["client"] == "a"
    assert found[2].facts["code"] == "norm"
    assert 0 < found[0].cursor < found[1].cursor < found[2].cursor
    assert found[0].time_s <= found[2].time_s
    rest = store.history(found[0].cursor, 1)
    assert rest == found[1:2]
    assert store.history(found[2].cursor) == []


def test_a_file_becomes_an_artifact(open_again: Opener, tmp_path: Path) -> None:
    store = open_again()
    for data in (b"abc", b"abc", b"x" * 3000):
        path, digest = tmp_path / "come", hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        assert store.put_file(path, digest) == digest
        assert not path.exists()
        assert store.get(digest) == data
    assert len([path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]) == 2


def test_a_round_whose_end_was_cut_short_has_not_ended(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.admit(contribution(1, "a"))
    journal = tmp_path / "metrics.jsonl"
    before = journal.stat().st_size
    row, ended = publication(store, 1), {"round": 1, "admitted": 1}
    store.publish(row, ended, [receipt(store, 1)])
    whole = journal.read_bytes()
    for size in range(before, len(whole)):
        journal.write_bytes(whole[:size])
        again = FolderStore(tmp_path)
        assert (again.latest(), again.notes("round"), again.receipts()) == (None, [], [])
        assert [each.client for each in again.contributions(1)] == ["a"]
    again.publish(row, ended, [receipt(again, 1)])
    again = FolderStore(tmp_path)
    assert [each.round for each in again.publications()] == [1]
    assert again.notes("round") == [ended]
    assert len(again.receipts()) == 1

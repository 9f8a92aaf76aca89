"""No room: real file systems of two megabytes, filled."""

from __future__ import annotations

import os

import pytest
from tests.disks import SmallDisk

from anabranch.coordinator.store import Contribution, FullError, Store, StoreConfig, open_store


def admit(store: Store, client: str, data: bytes) -> bool:
    row = Contribution(round=1, client=client, digest=store.put(data), size_bytes=len(data))
    return store.admit(row)


def admit_until_full(store: Store) -> int:
    """Rows alone, until there is no room for one more; how many were admitted."""
    for number in range(10_000):
        row = Contribution(round=1, client=f"late-{number}", digest="d", size_bytes=1)
        try:
            assert store.admit(row)
        except FullError:
            return number
    raise AssertionError("the disk is not small")


@pytest.mark.parametrize("url", ["journal", "sqlite:///rounds.db"])
def test_a_full_disk_refuses_and_what_was_admitted_stays(small_disk: SmallDisk, url: str) -> None:
    def open_again() -> Store:
        return open_store(StoreConfig(url=url), small_disk.folder, federation="f", run="r")

    store = open_again()
    assert admit(store, "a", b"first")
    small_disk.fill()
    with pytest.raises(FullError, match=r"has no room: .*; free some, and go on"):
        store.put(os.urandom(100_000))
    admitted = admit_until_full(store)
    # Nothing of what was refused is there, all of the rest is, now and after a restart.
    expected = ["a", *(f"late-{number}" for number in range(admitted))]
    small_disk.free()
    second = open_again()
    for again in (store, second):
        assert sorted(row.client for row in again.contributions(1)) == sorted(expected)
        assert again.get(again.contributions(1)[0].digest) == b"first"
        assert [name.name for name in small_disk.folder.rglob("*.partial")] == []
    assert admit(store, "b", b"second")
    for one in (store, second, open_again()):
        assert one is second or len(one.contributions(1)) == len(expected) + 1
        one.close()

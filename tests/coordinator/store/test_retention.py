from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.coordinator.store import Contribution, FullError, Publication

KIB = 1024
Opener = Callable[..., Any]


def run_round(store: Any, number: int, clients: str = "ab") -> dict[str, str]:
    """A published round of 1 KiB an artifact; the digests by what they are."""
    found = {}
    for client in clients:
        found[client] = store.put(f"{store.run}{number}{client}".encode().ljust(KIB))
        row = Contribution(round=number, client=client, digest=found[client], size_bytes=KIB)
        assert store.admit(row)
    found["adapter"] = store.put(f"{store.run}{number}adapter".encode().ljust(KIB))
    row = Publication(round=number, digest=found["adapter"], adapter_hash="h")
    store.publish(row, {"round": number})
    return found


def age(folder: Path) -> None:
    for path in (folder / "artifacts").rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "artifacts").rglob("*") if path.is_file()}


def test_the_last_rounds_are_kept_with_their_starts_and_all_rows(
    database_url: str, open_one: Opener, tmp_path: Path
) -> None:
    store = open_one(database_url, keep_rounds=2)
    rounds = {number: run_round(store, number) for number in (1, 2, 3, 4)}
    age(tmp_path)
    assert store.tidy() == 5
    starts = {rounds[2]["adapter"]}
    assert kept(tmp_path) == {*rounds[3].values(), *rounds[4].values(), *starts}
    assert [row.round for row in store.publications()] == [1, 2, 3, 4]
    assert len(store.contributions()) == 8
    assert store.tidy() == 0


def test_the_adapter_in_service_stays_however_old(
    database_url: str, open_one: Opener, tmp_path: Path
) -> None:
    store = open_one(database_url, keep_rounds=1)
    first = run_round(store, 1)
    for number in range(2, 6):  # abandoned
        row = Contribution(round=number, client="a", digest=store.put(b"a"), size_bytes=1)
        assert store.admit(row)
    age(tmp_path)
    store.tidy()
    assert store.get(first["adapter"])
    with pytest.raises(KeyError):
        store.get(first["a"])


def test_what_a_tag_stands_for_stays_until_the_tag_moves(
    database_url: str, open_one: Opener, tmp_path: Path
) -> None:
    store = open_one(database_url, keep_rounds=1)
    first = run_round(store, 1)
    store.tag("champion", 1)
    for number in range(2, 5):
        run_round(store, number)
    age(tmp_path)
    store.tidy()
    assert store.get(first["adapter"])
    with pytest.raises(KeyError):
        store.get(first["a"])
    store.tag("champion", 4)
    store.tidy()
    with pytest.raises(KeyError):
        store.get(first["adapter"])


def test_what_another_run_holds_stays_and_remnants_go(
    database_url: str, open_one: Opener, tmp_path: Path
) -> None:
    one = open_one(database_url, run="one", keep_rounds=1)
    two = open_one(database_url, run="two")
    shared = b"the same".ljust(KIB)
    for store in (one, two):
        digest = store.put(shared)
        assert store.admit(Contribution(round=1, client="a", digest=digest, size_bytes=KIB))
    run_round(one, 2)
    orphan = one.put(b"killed before its row")
    folder = tmp_path / "artifacts" / digest[:2]
    (folder / f"{digest}.77.partial").write_bytes(b"killed while writ")
    (folder / "README").write_text("not ours")
    age(tmp_path)
    young = one.put(b"on its way to its row")
    assert one.tidy() == 2
    left = kept(tmp_path)
    assert {digest, young, "README"} <= left
    assert orphan not in left


def test_a_quota_refuses_what_does_not_fit_and_retention_makes_room(
    database_url: str, open_one: Opener, tmp_path: Path
) -> None:
    store = open_one(database_url, quota_mb=1, keep_rounds=1)
    half = os.urandom(512 * KIB)
    for number, data in ((1, half), (2, half[:-1])):
        row = Contribution(round=number, client="a", digest=store.put(data), size_bytes=len(data))
        assert store.admit(row)
    before = kept(tmp_path)
    with pytest.raises(FullError, match=r"quota of f is full: 1048575 of 1048576 bytes are held"):
        store.put(half[:-2])
    assert kept(tmp_path) == before
    # Another run of the federation has the same quota, another federation has not.
    with pytest.raises(FullError):
        open_one(database_url, run="other", quota_mb=1).put(half[:-2])
    store.tidy()
    assert store.put(half[:-2])

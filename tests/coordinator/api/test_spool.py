"""Uploads on their way: hashed as their bytes come, also those that came before."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from anabranch.coordinator.api.spool import Spool, Wanted

DATA = bytes(range(256)) * 5000


def wanted(data: bytes = DATA, client: str = "a") -> Wanted:
    return Wanted("f", client, 1, hashlib.sha256(data).hexdigest(), len(data))


def test_what_came_before_is_hashed_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.begin(wanted())
    first.add(DATA[:700_000])
    first.close()
    assert spool.offset(wanted()) == 700_000
    second = spool.begin(wanted())
    assert second.offset == 700_000
    second.add(DATA[700_000:])
    assert second.holds(wanted())
    assert second.read() == DATA
    second.close()


def test_what_is_not_what_was_announced(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    short = spool.begin(wanted())
    short.add(DATA[:-1])
    assert not short.holds(wanted())
    short.add(b"\0")
    assert not short.holds(wanted())
    short.close()
    # A client's other update takes its place.
    other = spool.begin(wanted(b"other"))
    assert other.offset == 0
    other.close()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    arrival = Spool(tmp_path).begin(wanted())
    arrival.close()
    arrival.close()
    with pytest.raises(ValueError, match="has ended"):
        arrival.add(b"x")
    assert arrival.path.read_bytes() == b""

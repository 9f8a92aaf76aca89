"""The load benchmark at its smallest: our side, with real processes; the rival's takes a minute."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks import coordinator
from benchmarks.load import material
from benchmarks.load.ours import Load, api
from benchmarks.load.updates import client_name, read_updates
from benchmarks.load.watching import watched

from anabranch.wire import decode_update

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_every_client_is_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    load = Load(clients=3, entries=4096, at_once=2)
    with api(tmp_path, load) as served:
        first, second = served.take(2), served.take(3)
        store = served.store()
        names = [client_name(number) for number in range(3)]
        for number in (1, 2):
            assert [row.client for row in store.contributions(number)] == names
        assert store.refusals() == []
        digests = {row.digest for row in store.contributions()}
        assert len(digests) == 6
        # Headers are compressed, each by itself.
        sizes = [len(store.get(digest)) for digest in digests]
        assert all(abs(size - first.size_bytes) < 64 for size in sizes)
        store.close()
    assert len(first.took_s) == len(second.took_s) == 3
    assert first.updates_per_s > 0
    assert first.server.cpu_s > 0


def test_each_header_goes_with_the_one_payload(tmp_path: Path) -> None:
    plan = material.plan(2, 4096, 1)
    blob = material.update(plan, 4096)
    (tmp_path / "update.bin").write_bytes(blob)
    updates = read_updates(tmp_path / "update.bin")
    layout = {
        name: tuple(tensor.shape) for name, tensor in material.template(4096).tensors().items()
    }
    meta, tensors = decode_update(blob, layout)
    assert meta.client == client_name(0)
    for number in (0, 1):
        own, same = decode_update(updates.header(number) + updates.payload, layout)
        assert own.client == client_name(number)
        assert own.nonce != meta.nonce
        assert all(bool((same[name] == tensor).all()) for name, tensor in tensors.items())


def test_a_watch_sees_what_was_taken_and_spent() -> None:
    with watched(os.getpid()) as seen:
        held = bytearray(64 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
        del held
        sum(number * number for number in range(1_000_000))
    assert 60 < seen.above_idle_mib < 100
    assert seen.cpu_s > 0


def test_standing_of_some_federations() -> None:
    rows = list(coordinator.status(quick=True))
    assert [row.scenario for row in rows] == [
        "3 federations, 300 clients, of all", "3 federations, 300 clients, of one, over gRPC",
    ]  # fmt: skip
    assert all(row.ours > 0 for row in rows)


@pytest.mark.parametrize(("share", "value"), [(0.5, 51.0), (0.99, 100.0), (1.0, 100.0)])
def test_shares_of_values(share: float, value: float) -> None:
    assert coordinator.at([float(number) for number in range(100, 0, -1)], share) == value

"""Uploads: the same admission as of what Flower brings, in parts, once per client and round."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from anabranch.client.api.caller import CallError
from anabranch.client.api.transfer import upload
from anabranch.coordinator.api.audit import check_audit
from anabranch.wire.keys import seeded_key
from anabranch.wire.sealing import seal
from anabranch.wire.v1 import coordinator_pb2 as pb

Start = Callable[..., Any]


def soon(holds: Callable[[], Any]) -> None:
    """Wait for what becomes true within some seconds."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def header(data: bytes, number: int = 1, **changes: Any) -> pb.UploadHeader:
    given = {
        "federation": "f", "round": number, "size_bytes": len(data),
        "digest": hashlib.sha256(data).hexdigest(), **changes,
    }  # fmt: skip
    return pb.UploadHeader(**given)


def parts(head: pb.UploadHeader, *data: bytes) -> Iterator[pb.UploadPart]:
    yield pb.UploadPart(header=head)
    for one in data:
        yield pb.UploadPart(data=one)


def test_an_update_is_admitted_once(start_world: Start) -> None:
    world = start_world()
    a = world.peer("a", "client", "f")
    assert a.call("Uploads.Order", pb.OrderRequest(federation="f")).plan == ""
    world.plan(1, "a", "b")
    plan = world.order(a)
    data = world.made(plan, "a")
    digest = upload(a, "f", 1, data, {"num-examples": 5.0, "made-up": 1.0})
    assert digest == hashlib.sha256(data).hexdigest()
    store = world.store()
    (row,) = store.contributions(1)
    assert (row.client, row.digest, row.size_bytes) == ("a", digest, len(data))
    assert row.metrics == {"num-examples": 5.0}
    assert store.get(digest) == data
    # Whoever lost the answer asks again, and is told.
    assert upload(a, "f", 1, data) == digest
    assert a.call("Uploads.Order", pb.OrderRequest(federation="f")).admitted
    again = world.made(plan, "a", seed=1)
    with pytest.raises(CallError) as error:
        upload(a, "f", 1, again)
    assert error.value.code == "duplicate"
    assert len(store.contributions(1)) == 1
    assert world.refused("duplicate")[0]["name"] == "a"
    assert list((world.folder / "api" / "uploads").iterdir()) == []
    done = [row for row in world.audit() if row["method"].endswith("/Upload")]
    assert done[0]["outcome"] == "done"
    assert done[0]["facts"]["digest"] == digest


def test_an_upload_goes_on_where_it_was_cut_off(start_world: Start) -> None:
    world = start_world()
    a = world.peer("a", "client", "f")
    world.plan(1, "a")
    data = world.made(world.order(a), "a")
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", parts(header(data), data[:1000]), wait=True)
    assert error.value.code == "cut-off"
    assert a.call("Uploads.Offset", header(data)).offset == 1000
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", parts(header(data), data), wait=True)
    assert error.value.code == "wrong-offset"
    upload(a, "f", 1, data)
    assert [row.client for row in world.store().contributions(1)] == ["a"]


def test_an_upload_outlives_its_connection_and_the_api(start_world: Start) -> None:
    world = start_world(limits={"stall_s": 60})
    credentials = world.enrol("a", "client", "f")
    a = world.caller(credentials)
    world.plan(1, "a")
    data = world.made(world.order(a), "a")
    ended = threading.Event()

    def hanging() -> Iterator[bytes]:
        for part in parts(header(data), data[:500]):
            yield part.SerializeToString()
        ended.wait()

    with grpc.secure_channel(world.address, credentials.channel()) as channel:
        upload_call = channel.stream_unary("/anabranch.wire.v1.Uploads/Upload")
        future = upload_call.future(hanging(), timeout=60)
        soon(lambda: a.call("Uploads.Offset", header(data)).offset == 500)
        future.cancel()
        ended.set()
    # Cancelled while it waits, or told that no more comes: either is written down.
    ends = ("cut", "cut-off")
    soon(lambda: [row for row in world.audit() if row["outcome"] in ends or row["code"] in ends])
    world.restart()
    a = world.caller(credentials, world.address)
    assert a.call("Uploads.Offset", header(data)).offset == 500
    upload(a, "f", 1, data)
    assert [row.client for row in world.store().contributions(1)] == ["a"]
    check_audit(line for _, line in world.server.audit.entries())


def test_admission_refuses_alike(start_world: Start) -> None:
    world = start_world()
    a = world.peer("a", "client", "f")
    world.plan(1, "a")
    plan = world.order(a)
    lies = {
        "wrong-round": plan.model_copy(update={"round": 2}),
        "wrong-run": plan.model_copy(update={"run": "other"}),
        "wrong-start-hash": plan.model_copy(update={"start_hash": "ab" * 32}),
        "wrong-federation": plan.model_copy(update={"federation": "g"}),
    }
    updates = {code: world.made(lie, "a") for code, lie in lies.items()}
    for code, data in {**updates, "wrong-client": world.made(plan, "b")}.items():
        with pytest.raises(CallError) as error:
            upload(a, "f", 1, data)
        assert error.value.code == code
        assert world.store().refusals(1)[-1].code == code
        assert world.refused(code)[0]["facts"]["federation"] == "f"
    upload(a, "f", 1, world.made(plan, "a"))


def test_sealed_updates_are_sealed_to_the_key_of_the_order(start_world: Start) -> None:
    world = start_world(signed=True, sealed=True)
    a = world.peer("client-0000", "client", "f")
    world.plan(1, "client-0000")
    plan = world.order(a)
    assert plan.seal_to is not None
    data = world.made(plan, "client-0000", key=seeded_key("client-0000", 0))
    for sent in (data, seal(data, bytes(range(32)))):
        with pytest.raises(CallError) as error:
            upload(a, "f", 1, sent)
        assert error.value.code == "seal"
    upload(a, "f", 1, seal(data, bytes.fromhex(plan.seal_to)))
    (row,) = world.store().contributions(1)
    assert (world.store().get(row.digest), row.size_bytes) == (data, len(data) + 48)


def test_who_was_not_asked_or_comes_late(start_world: Start) -> None:
    world = start_world(collect={"stragglers": "carry", "max_staleness": 1}, rounds=9)
    a, b = world.peer("a", "client", "f"), world.peer("b", "client", "f")
    world.plan(1, "a")
    late = world.made(world.order(a), "a")
    with pytest.raises(CallError) as error:
        upload(b, "f", 1, world.made(world.order(a), "b"))
    assert error.value.code == "unasked"
    store = world.store()
    store.note("state", {"round": 1, "state": "merging"})
    other = world.made(world.order(a), "a", seed=1)
    with pytest.raises(CallError) as error:
        upload(a, "f", 1, other)
    assert error.value.code == "closed"
    # The round is over: what comes now is carried into the one under way.
    store.note("round", {"round": 1, "status": "abandoned"})
    world.plan(2, "b")
    upload(a, "f", 1, late)
    assert [(row.round, row.client) for row in store.contributions()] == [(1, "a")]
    with pytest.raises(CallError) as error:
        upload(a, "f", 7, late)
    assert error.value.code == "closed"


def test_an_upload_of_which_nothing_came_leaves_nothing(start_world: Start) -> None:
    world = start_world()
    a = world.peer("a", "client", "f")
    world.plan(1, "a")
    data = world.made(world.order(a), "a")
    assert world.code("Uploads.Upload", parts(header(data)), a) == "cut-off"
    assert list((world.folder / "api" / "uploads").iterdir()) == []

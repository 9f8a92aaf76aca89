"""Health, reflection, streams that go on, downloads that resume, and what is withdrawn."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from anabranch.client.api.caller import CallError
from anabranch.client.api.transfer import download, upload
from anabranch.coordinator.store import Refusal
from anabranch.wire.receipt import check_chain
from anabranch.wire.v1 import coordinator_pb2 as pb

Start = Callable[..., Any]


def test_health_and_reflection(start_world: Start) -> None:
    world = start_world()
    plain = grpc.ssl_channel_credentials(world.server.authority.pem)
    with grpc.secure_channel(world.enrol_address, plain) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "anabranch.wire.v1.Uploads"):
            found = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=20)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        # Reflection is for peers.
        names = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as error:
            list(names.ServerReflectionInfo(iter([asked]), timeout=20))
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with grpc.secure_channel(world.address, world.enrol("a", "auditor", "f").channel()) as channel:
        names = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = names.ServerReflectionInfo(iter([asked]), timeout=20)
        found = [one.name for one in reply.list_services_response.service]
        assert "anabranch.wire.v1.Federations" in found
    # What there is not is refused like everything else.
    with (
        grpc.secure_channel(world.enrol_address, plain) as channel,
        pytest.raises(grpc.RpcError),
    ):
        channel.unary_unary("/anabranch.wire.v1.Peers/Everything")(b"", timeout=20)
    assert world.refused("method")[0]["method"] == "/anabranch.wire.v1.Peers/Everything"
    # Where its federations are gone, it says so.
    (world.folder / "federations").rename(world.folder / "gone")
    with grpc.secure_channel(world.enrol_address, plain) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = set()
        for _ in range(100):
            states.add(health.Check(health_pb2.HealthCheckRequest(), timeout=20).status)
            if health_pb2.HealthCheckResponse.NOT_SERVING in states:
                break
            threading.Event().wait(0.1)
        assert health_pb2.HealthCheckResponse.NOT_SERVING in states


def test_events_go_on_and_end_with_their_peer(start_world: Start) -> None:
    world = start_world()
    world.plan(1, "a")
    store = world.store()
    store.note("receipt-secret", {"secret": "opens a receipt"})
    look = world.peer("look", "auditor", "f")
    stream = look.stream("Federations.Events", pb.EventsRequest(federation="f"))
    assert [next(stream).kind for _ in range(2)] == ["planned", "state"]
    store.note("control", {"want": "pause", "by": "somebody"})
    event = next(stream)
    assert (event.kind, json.loads(event.facts)["want"]) == ("control", "pause")
    with pytest.raises(CallError) as error:
        next(look.stream("Federations.Events", pb.EventsRequest(federation="f")))
    assert error.value.code == "busy"
    world.server.peers.revoke("look")
    with pytest.raises(CallError) as error:
        next(stream)
    assert error.value.code == "revoked"
    rest = world.peer("other", "operator", "f").stream(
        "Federations.Events", pb.EventsRequest(federation="f", after=event.cursor - 1, once=True)
    )
    assert [one.cursor for one in rest] == [event.cursor]


@pytest.mark.parametrize("private", [False, True])
def test_events_tell_nothing_of_one_update_where_a_federation_is_private(
    start_world: Start, private: bool
) -> None:
    privacy = {"privacy": {"clip": 0.5, "epsilon": 8, "delta": 1e-5}} if private else {}
    world = start_world(recipe={"method": "fedit"}, **privacy)
    a = world.peer("a", "client", "f")
    world.plan(1, "a", "b")
    digest = upload(a, "f", 1, world.made(world.order(a), "a"), {"num-examples": 5.0})
    world.store().refuse(Refusal(round=1, client="b", code="norm", reason="its norm is 9.25"))
    look = world.peer("look", "auditor", "f")
    events = look.stream("Federations.Events", pb.EventsRequest(federation="f", once=True))
    told = {one.kind: json.loads(one.facts) for one in events}
    if private:
        assert told["admitted"] == {"round": 1, "client": "a"}
        assert told["refused"] == {"round": 1, "client": "b", "code": "norm"}
    else:
        assert told["admitted"]["digest"] == digest
        assert told["refused"]["reason"] == "its norm is 9.25"


def test_a_run_is_read_downloaded_and_withdrawn_from(
    start_world: Start, run_federation: Callable[..., Path]
) -> None:
    world = start_world()
    folder = run_federation(world.folder / "federations" / "run", name="run", rounds=2)
    assert folder.name == "run"
    admin = world.peer("root", "admin", "*")
    rows = list(admin.stream("Federations.ListRounds", pb.ListRoundsRequest(federation="run")))
    assert [(one.round, one.status, one.admitted) for one in rows] == [
        (1, "published", 3), (2, "published", 3),
    ]  # fmt: skip
    adapters = list(admin.stream("Adapters.ListAdapters", pb.ListAdaptersRequest(federation="run")))
    assert [one.round for one in adapters if one.in_service] == [2]
    # A download goes on where it was cut off.
    whole = world.folder / "whole"
    size, digest = download(admin, "run", "latest", whole)
    assert digest == adapters[1].digest == hashlib.sha256(whole.read_bytes()).hexdigest()
    again = world.folder / "again"
    (world.folder / "again.partial").write_bytes(whole.read_bytes()[: size - 7])
    request = pb.DownloadRequest(federation="run", which="2", offset=size - 7)
    parts = list(admin.stream("Adapters.Download", request))
    assert [len(part.data) for part in parts] == [7, 0]
    assert download(admin, "run", "2", again) == (size, digest)
    # One that was damaged on the way is not taken.
    (world.folder / "bad.partial").write_bytes(b"x" + whole.read_bytes()[1:])
    with pytest.raises(CallError) as error:
        download(admin, "run", "2", world.folder / "bad")
    assert error.value.code == "bad-digest"
    for which, offset, code in (("7", 0, "adapter"), ("latest", size + 1, "wrong-offset")):
        request = pb.DownloadRequest(federation="run", which=which, offset=offset)
        with pytest.raises(CallError) as error:
            list(admin.stream("Adapters.Download", request))
        assert error.value.code == code
    # A client is withdrawn, and the receipts say it.
    asked = pb.WithdrawRequest(federation="run", clients=["nobody"])
    assert world.code("Federations.Withdraw", asked, admin) == "invalid"
    asked = pb.WithdrawRequest(federation="run", clients=["client-0001"])
    done = admin.call("Federations.Withdraw", asked, wait=True)
    assert (done.round, list(done.redone)) == (3, [1, 2])
    found = [one.content for one in admin.stream("Federations.Receipts",
             pb.ReceiptsRequest(federation="run"))]  # fmt: skip
    chain = check_chain(found, None)
    assert [one.kind for one in chain] == ["merge", "merge", "withdrawal", "withdrawal"]
    assert chain[-1].output is not None
    assert chain[-1].output.adapter_hash == done.adapter_hash
    assert [row["facts"]["clients"] for row in world.audit()
            if row["method"].endswith("/Withdraw") and row["outcome"] == "done"] == [
        ["client-0001"],
    ]  # fmt: skip

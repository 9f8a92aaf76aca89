"""What an attacker tries: each is refused, and each is in the audit log."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.api.caller import CallError
from anabranch.client.api.credentials import Credentials, new_request
from anabranch.client.api.enrolling import enrol, rotate
from anabranch.client.api.transfer import download, upload
from anabranch.coordinator.api.audit import check_audit
from anabranch.coordinator.api.authority import Authority
from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.roles import TABLE
from anabranch.wire.errors import WireError
from anabranch.wire.service import methods
from anabranch.wire.v1 import coordinator_pb2 as pb

Start = Callable[..., Any]
STATUS = pb.StatusRequest(federation="f")


def issued(world: Any, name: str, authority: Authority, seconds: float = 3600) -> Credentials:
    """A certificate of some authority that no register holds."""
    key_pem, csr_pem = new_request(name)
    _, pem = authority.issue(csr_pem, Identity(f"org-{name}", name, Role.CLIENT), seconds)
    made = Credentials(world.folder / "forged" / name)
    made.write(key_pem, pem, world.server.authority.pem, {})
    return made


def soon(holds: Callable[[], Any]) -> Any:
    """What becomes true, of a busy machine within a minute."""
    end = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def slow(head: pb.UploadHeader, data: bytes, pause_s: float) -> Iterator[pb.UploadPart]:
    yield pb.UploadPart(header=head)
    for one in data:
        time.sleep(pause_s)
        yield pb.UploadPart(data=bytes([one]))


def test_every_method_has_roles() -> None:
    missing = set(methods()) - set(TABLE)
    assert not missing, f"{sorted(missing)}: give them a row in roles.TABLE"
    assert all(rule.roles for rule in TABLE.values())
    # Nobody without a certificate gets further than the door.
    assert {path.rsplit("/", 1)[1] for path, rule in TABLE.items() if rule.anyone} == {
        "Enrol", "Check",
    }  # fmt: skip


def test_certificates(start_world: Start, tmp_path: Path) -> None:
    """None, another authority's, one that no register holds, one that ended, one revoked."""
    world = start_world()
    ca = world.server.authority.pem
    # Without one, where none is asked for, and where one is.
    assert world.code("Federations.Status", STATUS, world.caller(ca, world.enrol_address)) == (
        "no-certificate"
    )
    assert world.refused("no-certificate")[0]["method"].endswith("/Status")
    assert world.code("Federations.Status", STATUS, world.caller(ca)) == "unavailable"
    # Of another authority: with our name, and its own key.
    forged = issued(world, "eve", Authority(tmp_path / "other"))
    assert world.code("Federations.Status", STATUS, world.caller(forged)) == "unavailable"
    # That TLS finds ended.
    ended = issued(world, "old", world.server.authority, -60)
    assert world.code("Federations.Status", STATUS, world.caller(ended)) == "unavailable"
    lost = soon(lambda: [r for r in world.audit() if r["code"] == "handshake"])
    soon(lambda: sum(
        r["facts"]["connections"] for r in world.audit() if r["code"] == "handshake"
    ) >= 3)  # fmt: skip
    assert lost[0]["outcome"] == "refused"
    # Of our authority, but never handed out by way of a token.
    stray = issued(world, "stray", world.server.authority)
    assert world.code("Federations.Status", STATUS, world.caller(stray)) == "unknown-certificate"
    # That ends while its connection is open.
    short = world.enrol("short", "client", "f")
    caller = world.caller(short)
    caller.call("Federations.Status", STATUS)
    old = world.server.peers.named("short")[0]
    world.server.peers.renew(old, "next", time.time() + 60, -1.0)
    assert world.code("Federations.Status", STATUS, caller) == "expired"
    # Revoked: at once, over the connection that is open, and for every call.
    admin = world.peer("root", "admin", "*")
    victim = world.peer("victim", "client", "f")
    victim.call("Federations.Status", STATUS)
    assert admin.call("Peers.Revoke", pb.RevokeRequest(name="victim")).certificates == 1
    assert world.code("Federations.Status", STATUS, victim) == "revoked"
    assert world.code("Uploads.Order", pb.OrderRequest(federation="f"), victim) == "revoked"
    assert [row["name"] for row in world.refused("revoked")] == ["victim", "victim"]
    assert world.refused("expired")[0]["name"] == "short"
    assert world.refused("unknown-certificate")


def test_roles_and_other_organisations_federations(start_world: Start) -> None:
    world = start_world()
    world.plan(1, "a")
    a = world.peer("a", "client", "f")
    other = world.peer("b", "client", "g")
    look = world.peer("look", "auditor", "f")
    run = world.peer("run", "operator", "f")
    # Another organisation's federation: not even that it is there.
    for name, request in {
        "Federations.Status": STATUS,
        "Uploads.Order": pb.OrderRequest(federation="f"),
        "Uploads.Join": pb.JoinRequest(federation="f"),
        "Adapters.ListAdapters": pb.ListAdaptersRequest(federation="f"),
        "Federations.ListRounds": pb.ListRoundsRequest(federation="f"),
    }.items():
        assert world.code(name, request, other) == "federation"
    with pytest.raises(CallError) as error:
        download(other, "f", "latest", world.folder / "stolen")
    assert error.value.code == "federation"
    with pytest.raises(CallError) as error:
        upload(other, "f", 1, b"x")
    assert error.value.code == "federation"
    assert world.code("Federations.Status", pb.StatusRequest(federation="none"), a) == "federation"
    assert {row["name"] for row in world.refused("federation")} == {"a", "b"}
    assert len(world.refused("federation")) == 8
    # Roles: nobody does what their role may not.
    escalations = [
        (a, "Federations.Ask", pb.AskRequest(federation="f", want="abort")),
        (a, "Peers.Invite", pb.InviteRequest(name="x", organisation="x", role=pb.ROLE_ADMIN)),
        (a, "Peers.Revoke", pb.RevokeRequest(name="b")),
        (a, "Federations.Withdraw", pb.WithdrawRequest(federation="f", clients=["b"])),
        (look, "Federations.Ask", pb.AskRequest(federation="f", want="pause")),
        (look, "Uploads.Join", pb.JoinRequest(federation="f")),
        (run, "Peers.Invite", pb.InviteRequest(name="x", organisation="x", role=pb.ROLE_CLIENT)),
        (run, "Uploads.Order", pb.OrderRequest(federation="f")),
    ]
    for caller, name, request in escalations:
        assert world.code(name, request, caller) == "role"
    assert len(world.refused("role")) == len(escalations)
    # An admin of one federation hands out no more than it has.
    admin = world.peer("boss", "admin", "f")
    for federations in (["g"], ["*"], ["f", "g"]):
        invited = pb.InviteRequest(
            name="x", organisation="x", role=pb.ROLE_AUDITOR, federations=federations
        )
        assert world.code("Peers.Invite", invited, admin) == "federation"
    assert world.code("Peers.Revoke", pb.RevokeRequest(name="b"), admin) == "peer"
    assert list(admin.stream("Peers.ListPeers", pb.ListPeersRequest()))
    assert "b" not in [one.name for one in admin.stream("Peers.ListPeers", pb.ListPeersRequest())]
    with pytest.raises(CallError, match="of all federations"):
        list(admin.stream("Peers.Audit", pb.AuditRequest()))


def test_replay_oversize_and_paths(start_world: Start) -> None:
    world = start_world(signed=True)
    a = world.peer("client-0000", "client", "f")
    world.plan(1, "client-0000", "client-0001")
    from anabranch.wire.keys import seeded_key

    plan, key = world.order(a), seeded_key("client-0000", 0)
    data = world.made(plan, "client-0000", key=key)
    # A token counts once.
    invitation = world.invite("again", "client", "f")
    enrol(invitation, world.folder / "peers" / "again")
    with pytest.raises(CallError) as error:
        enrol(invitation, world.folder / "peers" / "twice")
    assert error.value.code == "token-used"
    # One vote per organisation; and a name is of one.
    for name, organisation, code in (
        ("second", "org-again", "vote-taken"), ("again", "org-else", "name-taken"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"one vote|another organisation") as refused:
            world.invite(name, "client", "f", organisation=organisation)
        assert getattr(refused.value, "code", "") == code
    # Oversize, by what is announced and by what is sent: nothing of it is kept.
    huge = pb.UploadHeader(federation="f", round=1, size_bytes=1 << 40, digest="ab" * 32)
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", iter([pb.UploadPart(header=huge)]), wait=True)
    assert error.value.code == "too-large"
    small = pb.UploadHeader(
        federation="f", round=1, size_bytes=10, digest=hashlib.sha256(data).hexdigest()
    )
    sent = iter([pb.UploadPart(header=small), pb.UploadPart(data=data)])
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", sent, wait=True)
    assert error.value.code == "too-large"
    big = iter([pb.UploadPart(header=small), pb.UploadPart(data=bytes(2 << 20))])
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", big, wait=True)
    # Of a part over the transport's limit no byte arrives; its upload may be gone on with.
    soon(lambda: len(world.refused("too-large")) == 2)
    assert sum(path.stat().st_size for path in (world.folder / "api" / "uploads").iterdir()) == 0
    # Paths where names belong.
    before = sorted(path for path in world.folder.rglob("*"))
    for name in ("../f", "..", "f/../../etc", "/etc/passwd", "f\0", ".", "f/", "a" * 300):
        assert world.code("Federations.Status", pb.StatusRequest(federation=name), a) == (
            "federation"
        )
        header = pb.UploadHeader(federation=name, round=1, size_bytes=1, digest="ab" * 32)
        assert world.code("Uploads.Offset", header, a) == "federation"
    for digest in ("../../x", "AB" * 32, "ab" * 31 + "/a"):
        header = pb.UploadHeader(federation="f", round=1, size_bytes=1, digest=digest)
        assert world.code("Uploads.Offset", header, a) == "header"
    admin = world.peer("root", "admin", "*")
    for name in ("../evil", "..", ".hidden", "a/b", ""):
        part = pb.CreateRequest(header=pb.CreateHeader(federation=name, config=""))
        assert world.code("Federations.Create", iter([part]), admin) == "name"
    for name in ("../x", "a/b", ".x", "x y", ""):
        for field in ("name", "organisation"):
            given = {"name": "n", "organisation": "o", field: name}
            request = pb.InviteRequest(role=pb.ROLE_AUDITOR, federations=["f"], **given)
            assert world.code("Peers.Invite", request, admin) == "invalid"
    after = sorted(path for path in world.folder.rglob("*") if "peers/root" not in str(path))
    assert [path for path in after if path not in before and path.name != "root"] == []
    assert len(world.refused("header")) == 3
    # An update is taken once; another of the client is no second vote, nor somebody else's name.
    upload(a, "f", 1, data)
    sent = iter([
        pb.UploadPart(header=pb.UploadHeader(
            federation="f", round=1, size_bytes=len(data), digest=hashlib.sha256(data).hexdigest(),
        )),
        pb.UploadPart(data=data),
    ])  # fmt: skip
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", sent, wait=True)
    assert error.value.code == "duplicate"
    # Replayed by another peer: it is not signed by that one.
    b = world.peer("client-0001", "client", "f")
    with pytest.raises(CallError) as error:
        upload(b, "f", 1, data)
    assert error.value.code == "wrong-key"
    assert world.refused("duplicate")
    assert world.refused("wrong-key")[0]["name"] == "client-0001"
    assert world.refused("token-used")
    check_audit(line for _, line in world.server.audit.entries())


def test_slow_loris_and_floods(start_world: Start) -> None:
    world = start_world(limits={"calls_per_s": 0.2, "burst": 30})
    a = world.peer("a", "client", "f")
    world.plan(1, "a")
    data = world.made(world.order(a), "a")
    head = pb.UploadHeader(
        federation="f", round=1, size_bytes=len(data), digest=hashlib.sha256(data).hexdigest()
    )
    # A byte now and then is no progress.
    began = time.monotonic()
    with pytest.raises(CallError) as error:
        a.call("Uploads.Upload", slow(head, data, 0.1), wait=True)
    assert error.value.code == "stalled"
    # To the end it would take minutes.
    assert time.monotonic() - began < 30
    assert world.refused("stalled")[0]["name"] == "a"
    # What came of it is kept, and an honest client goes on.
    offset = a.call("Uploads.Offset", head).offset
    assert 0 < offset < len(data)
    upload(a, "f", 1, data)
    # A connection that shows nothing, and one that never ends its handshake.
    hanging = socket.create_connection(("127.0.0.1", world.server.port))
    hanging.sendall(b"\x16\x03\x01")
    known = len(world.refused("handshake"))
    with socket.create_connection(("127.0.0.1", world.server.port)) as silent:
        context = ssl.create_default_context(cadata=world.server.authority.pem.decode())
        # Without a certificate TLS is done for the client, and the server hangs up.
        with context.wrap_socket(silent, server_hostname="localhost") as wrapped:
            wrapped.settimeout(5)
            with contextlib.suppress(OSError):
                assert wrapped.recv(10) == b""
    soon(lambda: len(world.refused("handshake")) > known)
    hanging.settimeout(5)
    assert hanging.recv(10) == b""
    hanging.close()
    # A flood: refused, and told once.
    codes = []
    for _ in range(60):
        try:
            a.call("Federations.Status", STATUS)
        except CallError as failed:
            codes.append(failed.code)
    assert set(codes) == {"quota"}
    assert len(codes) > 10
    assert len(world.refused("quota")) == 1


def test_rotation_and_the_log(start_world: Start) -> None:
    world = start_world()
    admin = world.peer("root", "admin", "*")
    held = world.enrol("a", "client", "f")
    first = (held.folder / "peer.pem").read_bytes()
    about = rotate(held, world.address)
    assert (held.folder / "peer.pem").read_bytes() != first
    assert (about["name"], about["role"]) == ("a", "client")
    world.caller(held).call("Federations.Status", STATUS)
    assert len([p for p in admin.stream("Peers.ListPeers", pb.ListPeersRequest())
                if p.name == "a"]) == 2  # fmt: skip
    lines = [entry.line for entry in admin.stream("Peers.Audit", pb.AuditRequest())]
    count, last = check_audit(iter(lines))
    assert count == len(lines) >= 3
    assert last == hashlib.sha256(lines[-1]).hexdigest()
    rest = [entry.number for entry in admin.stream("Peers.Audit", pb.AuditRequest(after=2))]
    assert rest[0] == 3
    for changed in (lines[1:], [*lines[:1], *lines[2:]], [lines[0].replace(b"root", b"toor")]):
        with pytest.raises(WireError) as error:
            check_audit(iter([*changed, *lines[-1:]]))
        assert error.value.code == "chain"

"""The API's state in one file: live, private, whole, and nothing beside it."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anabranch.client.api.caller import Caller
from anabranch.client.api.credentials import Credentials
from anabranch.client.api.enrolling import enrol
from anabranch.coordinator.api.audit import AuditLog
from anabranch.coordinator.api.backup import backup_state, holds_state, restore_state
from anabranch.coordinator.api.config import ApiConfig
from anabranch.coordinator.api.server import serving
from anabranch.wire.v1 import coordinator_pb2 as pb


def test_peers_of_a_live_api_come_back_with_its_state(
    start_world: Callable[..., Any], tmp_path: Path
) -> None:
    world = start_world()
    site, gone = world.enrol("site", "client", "f"), world.enrol("gone", "auditor", "f")
    world.server.peers.revoke("gone")
    unused = world.invite("late", "operator", "f")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            world.server.audit.append(method="test", outcome="done")

    writers = [threading.Thread(target=write) for _ in range(2)]
    for one in writers:
        one.start()
    try:
        counts = []
        for number in range(3):
            file = tmp_path / f"{number}.tar"
            done = backup_state(world.folder / "api", file)
            assert file.stat().st_mode & 0o777 == 0o600
            assert holds_state(file)
            assert restore_state(file, tmp_path / f"restored-{number}") == done
            counts.append((done.certificates, done.entries > 2))
    finally:
        stop.set()
        for one in writers:
            one.join()
    assert counts == [(2, True)] * 3
    state = tmp_path / "restored-2"
    assert {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()} == {
        "ca.key": 0o600, "ca.pem": 0o600, "peers.db": 0o600, "audit.jsonl": 0o600,
    }  # fmt: skip
    assert state.stat().st_mode & 0o777 == 0o700
    # Another machine serves it: the same certificates count, or do not, and tokens as well.
    config = ApiConfig.model_validate(
        {"federations": world.folder / "federations", "state": state, "port": 0, "enrol_port": 0}
    )
    with serving(config) as server:
        address = f"localhost:{server.port}"
        request = pb.StatusRequest(federation="f")
        with Caller(address, site) as caller:
            assert caller.call("Federations.Status", request).federation == "f"
        with Caller(address, gone) as caller:
            assert world.code("Federations.Status", request, caller) == "revoked"
        unused = replace(unused, address=address, enrol_address=f"localhost:{server.enrol_port}")
        enrol(unused, tmp_path / "late", None)
        assert Credentials(tmp_path / "late").about["name"] == "late"


def test_a_torn_line_of_the_log_is_left_out(
    start_world: Callable[..., Any], tmp_path: Path
) -> None:
    world = start_world()
    world.enrol("site", "client", "f")
    audit = world.folder / "api" / "audit.jsonl"
    whole = audit.read_bytes()
    audit.write_bytes(whole + b'{"method":"half')
    backup_state(world.folder / "api", tmp_path / "a.tar")
    restore_state(tmp_path / "a.tar", tmp_path / "a")
    assert (tmp_path / "a" / "audit.jsonl").read_bytes() == whole
    # The chain goes on there.
    AuditLog(tmp_path / "a" / "audit.jsonl").append(method="test", outcome="done")
    audit.write_bytes(whole.replace(b"Enrol", b"Other", 1) + whole[-1:])
    with pytest.raises(ValueError, match=r"audit.jsonl: is not whole"):
        backup_state(world.folder / "api", tmp_path / "b.tar")
    assert not list(tmp_path.glob("b.tar*"))


def put(tar: tarfile.TarFile, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data) if kind == tarfile.REGTYPE else 0, kind
    member.linkname = "/etc/passwd"
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("api/../../escaped", tarfile.REGTYPE),
        ("/tmp/escaped", tarfile.REGTYPE),
        ("api/uploads/x", tarfile.REGTYPE),
        ("api/ca.key", tarfile.SYMTYPE),
        ("api/ca.key", tarfile.LNKTYPE),
        ("api/peers.db", tarfile.DIRTYPE),
    ],
)
def test_a_tar_writes_nothing_else(tmp_path: Path, name: str, kind: bytes) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        put(tar, "api/ca.pem")
        put(tar, name, kind=kind)
    with pytest.raises(ValueError, match=r"bad.tar: is damaged or no backup: .* is not of an API"):
        restore_state(tmp_path / "bad.tar", tmp_path / "state")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.tar"]


def test_what_is_damaged_or_in_the_way_is_named(
    start_world: Callable[..., Any], tmp_path: Path
) -> None:
    world = start_world()
    for name in ("a", "b"):
        world.enrol(name, "auditor", "f")
    state, file = world.folder / "api", tmp_path / "a.tar"
    backup_state(state, file)
    with pytest.raises(ValueError, match=r"a.tar: exists already"):
        backup_state(state, file)
    with pytest.raises(ValueError, match=r"federations: holds no ca\.key"):
        backup_state(world.folder / "federations", tmp_path / "b.tar")
    with pytest.raises(ValueError, match="api: exists already; name a new folder"):
        restore_state(file, state)
    (tmp_path / "empty").mkdir()
    restore_state(file, tmp_path / "empty")
    data = file.read_bytes()
    for number, (damaged, told) in enumerate(
        [
            (data[: len(data) // 4], "damaged or no backup"),
            (data.replace(b'"method"', b'"methot"', 1), "chain|does not follow|is not the one"),
            (b"", "damaged or no backup"),
        ]
    ):
        path, place = tmp_path / f"damaged-{number}.tar", tmp_path / f"place-{number}"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=told):
            restore_state(path, place)
        assert not place.exists()

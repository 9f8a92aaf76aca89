"""Starting a federation over the API: who may, what would not work, which port it gets."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.loopback import certificates, node_key
from tests.coordinator.api.conftest import TASK, make_federation

from anabranch.client.api.caller import CallError
from anabranch.coordinator.flower import free_port
from anabranch.coordinator.rounds.control import Want, ask, heeded
from anabranch.coordinator.rounds.service import end, service
from anabranch.coordinator.supervision.lease import alone
from anabranch.wire.v1 import coordinator_pb2 as pb

Start = Callable[..., Any]
TASKS = {"numbers": {"task": TASK, "task_params": {"clients": 3}}}


def two_ports() -> tuple[int, int]:
    """The first of two that are free, side by side."""
    while True:
        first = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
        return first, first + 1


def test_a_federation_is_started_on_a_port_of_its_own(start_world: Start) -> None:
    ports = two_ports()
    world = start_world(flower={"ports": ports, "insecure": True, "tasks": TASKS})
    for name in ("g", "h"):
        make_federation(world.folder / "federations", name)
    operator = world.peer("op", "operator", "f", "g", "h")

    def started(name: str, **given: str) -> Any:
        return operator.call(
            "Federations.Start", pb.StartRequest(federation=name, **given), wait=True
        )

    now = started("f")
    assert (now.service.started, now.service.port, now.service.task, now.service.by) == (
        True, ports[0], "numbers", "op",
    )  # fmt: skip
    assert not now.running
    assert world.code("Federations.Start", pb.StartRequest(federation="f"), operator) == "started"
    assert started("g", task="numbers").service.port == ports[1]
    assert world.code("Federations.Start", pb.StartRequest(federation="h"), operator) == "no-port"
    # It rests once it was drained; another one takes its port, and it goes on elsewhere.
    store = world.store("f")
    ask(store, Want.DRAIN)
    heeded(store)
    said = service(store)
    assert said is not None
    end(store, said, "drained")
    now = operator.call("Federations.Status", pb.StatusRequest(federation="f"))
    assert (now.service.started, now.service.why, now.want) == (False, "drained", "drain")
    assert started("h").service.port == ports[0]
    g = world.store("g")
    said = service(g)
    assert said is not None
    end(g, said, "over")
    now = started("f")
    assert (now.service.port, now.want) == (ports[1], "run")
    end(store, now.service, "drained")
    # Where somebody else listens, it does not.
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports[1]))
        other.listen()
        assert (
            world.code("Federations.Start", pb.StartRequest(federation="f"), operator) == "no-port"
        )
    assert started("f").service.port == ports[1]
    for one in (store, g):
        one.close()
    stream = operator.stream("Federations.Events", pb.EventsRequest(federation="f", once=True))
    assert [one.kind for one in stream].count("service") == 5
    audited = [row for row in world.audit() if row["method"].endswith("/Start")]
    assert [row["facts"].get("port") for row in audited if row["outcome"] == "done"] == [
        ports[0], ports[1], ports[0], ports[1], ports[1],
    ]  # fmt: skip


def test_what_would_not_work_is_refused(start_world: Start) -> None:
    world = start_world(
        flower={
            "ports": two_ports(),
            "insecure": True,
            "tasks": {**TASKS, "other": TASKS["numbers"]},
        }
    )
    for name in ("g", "h"):
        make_federation(world.folder / "federations", name, quorum=2)
    admin = world.peer("root", "admin", "f", "g")

    def refused(name: str, task: str = "numbers", caller: Any = admin) -> tuple[str, str]:
        request = pb.StartRequest(federation=name, task=task)
        with pytest.raises(CallError) as error:
            caller.call("Federations.Start", request, wait=True)
        told = str(error.value)
        assert "\n" not in told
        assert str(world.folder) not in told
        return error.value.code, told

    assert refused("f", caller=world.peer("site", "client", "f"))[0] == "role"
    assert refused("f", caller=world.peer("look", "auditor", "f"))[0] == "role"
    assert refused("h")[0] == "federation"
    for task in ("", "numerals", "os:system"):
        code, told = refused("f", task)
        assert (code, "give one of numbers, other" in told) == ("task", True)
    shutil.rmtree(world.folder / "federations" / "f" / "start")
    code, told = refused("f")
    assert (code, "f/start" in told) == ("start-adapter", True)
    with alone(world.folder / "federations" / "g"):
        assert refused("g")[0] == "running"
        status = admin.call("Federations.Status", pb.StatusRequest(federation="g"))
        assert (status.running, status.HasField("service")) == (True, False)
    store = world.store("g")
    store.note("round", {"round": 3, "status": "abandoned", "reason": "0 admitted"})
    store.close()
    assert refused("g")[0] == "over"


def test_a_coordinator_without_superlinks_starts_none(start_world: Start) -> None:
    world = start_world()
    asked = pb.StartRequest(federation="f")
    assert world.code("Federations.Start", asked, world.peer("o", "operator", "f")) == "no-flower"


def test_nodes_keys_come_with_a_federation_and_are_needed(
    start_world: Start, tmp_path: Path
) -> None:
    certificates(tmp_path)
    names = {"certificate": "server.pem", "key": "server.key", "authority": "ca.pem"}
    tls = {name: tmp_path / file for name, file in names.items()}
    world = start_world(flower={"ports": two_ports(), "tls": tls, "tasks": TASKS})
    admin = world.peer("root", "admin", "*")
    home = make_federation(tmp_path / "made")
    _, public = node_key(tmp_path, "node")

    def create(name: str, keys: dict[str, bytes]) -> None:
        config = f'name = "{name}"\nrun = "r"\nclients = 2\nquorum = 2\n'
        files = {path.name: path.read_bytes() for path in (home / "start").iterdir()} | keys
        parts = [pb.CreateRequest(header=pb.CreateHeader(federation=name, config=config))]
        parts += [
            pb.CreateRequest(file=pb.StartFile(name=file, data=data))
            for file, data in files.items()
        ]
        admin.call("Federations.Create", iter(parts), wait=True)

    def code(name: str, keys: dict[str, bytes]) -> str:
        try:
            create(name, keys)
        except CallError as error:
            return error.code
        return ""

    key = public.read_bytes()
    assert code("bad", {"nodes/a.pub": b"no key"}) == "node-key"
    for name in ("nodes/../a.pub", "nodes/a", "nodes/.pub", "a.pub", "keys/a.pub"):
        assert code("bad", {name: key}) == "file"
    assert not (world.folder / "federations" / "bad").exists()
    create("few", {"nodes/a.pub": key})
    create("enough", {"nodes/a.pub": key, "nodes/b.pub": node_key(tmp_path, "b")[1].read_bytes()})
    asked = pb.StartRequest(federation="few")
    assert world.code("Federations.Start", asked, admin) == "node-keys"
    now = admin.call("Federations.Start", pb.StartRequest(federation="enough"), wait=True)
    assert now.service.started
    # Without any, nobody could join.
    assert world.code("Federations.Start", pb.StartRequest(federation="f"), admin) == "node-keys"

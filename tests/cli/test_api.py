"""The command line against a coordinator's API that it started itself."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from anabranch.client.session import open_session
from anabranch.coordinator.api.config import load_api
from anabranch.coordinator.api.server import serving
from anabranch.coordinator.flower import free_port
from anabranch.coordinator.store import open_store
from anabranch.coordinator.store.config import StoreConfig
from anabranch.vectors import seeded_start
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.plan import RoundPlan

TASK, PARAMS = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 3}'
FEDERATION = """
name = "f"
run = "r"
rounds = 3
durable = false
[recipe]
method = "mean"
[codec]
name = "dense"
feedback = 0.0
"""


def configured(folder: Path) -> Path:
    """The configuration of an API on two ports of its own."""
    (folder / "federations").mkdir()
    ports = f"port = {free_port()}\nenrol_port = {free_port()}\n"
    flower = f"[flower]\nports = [{free_port()}, 65535]\ninsecure = true\n"
    flower += f"[flower.tasks.numbers]\ntask = '{TASK}'\n"
    (folder / "api.toml").write_text(f'federations = "federations"\n{ports}{flower}')
    return folder / "api.toml"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """The folder of an API that is served."""
    with serving(load_api(configured(tmp_path))):
        yield tmp_path


def test_the_api_is_served_until_it_is_told_to_end(tmp_path: Path, run: Any) -> None:
    config = configured(tmp_path)
    address = f"localhost:{load_api(config).enrol_port}"
    found: list[Any] = []

    def look() -> None:
        end = time.monotonic() + 60
        while not (tmp_path / "api" / "ca.pem").exists() and time.monotonic() < end:
            time.sleep(0.05)
        credentials = grpc.ssl_channel_credentials((tmp_path / "api" / "ca.pem").read_bytes())
        with grpc.secure_channel(address, credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            found.append(stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True))
        # It listens: its own handler of the signal is there.
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=look)
    thread.start()
    code, out, _ = run("coordinator", "api", config, "--json")
    thread.join()
    assert (code, json.loads(out)["enrol_port"]) == (0, int(address.split(":")[1]))
    assert found[0].status == health_pb2.HealthCheckResponse.SERVING


def test_a_federation_by_way_of_the_api(served: Path, run: Any, tmp_path: Path) -> None:
    config, root, site = served / "api.toml", tmp_path / "root", tmp_path / "site"

    def cert(folder: Path) -> tuple[str, Path]:
        return "--cert", folder

    # The first admin is let in on the coordinator's machine, everybody else from there on.
    out = ("--out", tmp_path / "root.invite")
    given = ("--organisation", "host", "--role", "admin", "--federation", "*")
    assert run("coordinator", "invite", config, "root", *given, *out)[0] == 0
    assert run("client", "enrol", tmp_path / "root.invite", "--out", root)[0] == 0
    code, _, told = run("client", "enrol", tmp_path / "root.invite", "--out", tmp_path / "twice")
    assert (code, "token-used" in told) == (5, True)
    # A federation is created of a folder.
    made = tmp_path / "made"
    template = open_session(TASK, PARAMS).template
    write_adapter(template, made / "start")
    (made / "federation.toml").write_text(FEDERATION)
    assert run("federation", "create", made, *cert(root))[1] == "f: created\n"
    code, _, told = run("federation", "create", made, *cert(root))
    assert (code, "there is a federation f (exists)" in told) == (5, True)
    (made / "federation.toml").write_text(
        FEDERATION.replace('"f"', '"g"') + '[store]\nurl = "sqlite:////tmp/x.db"\n'
    )
    assert (
        "decided on the coordinator's machine" in run("federation", "create", made, *cert(root))[2]
    )
    # A client enrols, joins, and does a round.
    enrol_port = json.loads((tmp_path / "root.invite").read_text())["enrol_address"]
    given = ("--organisation", "clinic", "--role", "client", "--federation", "f")
    invited = (*given, "--enrol-address", enrol_port, "--out", tmp_path / "site.invite")
    assert run("peers", "invite", "site", *invited, *cert(root))[0] == 0
    assert run("client", "enrol", tmp_path / "site.invite", "--out", site)[0] == 0
    assert run("client", "join", "f", *cert(site))[1] == "f: joined\n"
    code, out_text, _ = run("client", "order", "f", *cert(site), "--out", tmp_path / "order")
    assert (code, out_text) == (1, "f: no round asks for anything of you\n")
    folder = served / "federations" / "f"
    with closing(open_store(StoreConfig(), folder, federation="f", run="r")) as store:
        store.note("planned", {"round": 1, "asked": ["site"], "planned_s": 0})
        store.note("state", {"round": 1, "state": "collecting"})
    assert run("client", "order", "f", *cert(site), "--out", tmp_path / "order")[0] == 0
    plan = RoundPlan.model_validate_json((tmp_path / "order" / "plan.json").read_text())
    start = seeded_start(template, plan.seed)
    change = {name: torch.full_like(one, 0.01) for name, one in start.tensors().items()}
    meta = UpdateMeta(
        kind="update", federation="f", run="r", base_hash=plan.base_hash, round=1,
        start_hash=plan.start_hash, client="site", nonce=b"n" * 16, seed=None, examples=1,
    )  # fmt: skip
    update = tmp_path / "update.bin"
    update.write_bytes(encode_update(change, meta, plan.codec).blob)
    code, told, _ = run("client", "upload", "f", update, *cert(site), "--metric", "train-loss=0.5",
                        "--json")  # fmt: skip
    assert (code, json.loads(told)["round"]) == (0, 1)
    # What everybody sees of it.
    found = json.loads(run("federation", "status", "f", *cert(site), "--json")[1])
    assert (found["round"], found["admitted"], found["state"]) == (1, ["site"], "collecting")
    assert run("federation", "pause", "f", *cert(root))[0] == 0
    assert json.loads(run("federation", "status", "f", *cert(root), "--json")[1])["want"] == "pause"
    code, _, told = run("federation", "abort", "f", *cert(site))
    assert (code, "client may not call this" in told) == (5, True)
    events = [
        json.loads(line) for line in run("federation", "events", "f", *cert(root))[1].splitlines()
    ]
    assert [one["kind"] for one in events] == ["joined", "planned", "state", "admitted", "control"]
    later = run("federation", "events", "f", *cert(root), "--after", events[2]["cursor"])[1]
    assert [json.loads(line)["kind"] for line in later.splitlines()] == ["admitted", "control"]
    assert run("federation", "rounds", "f", *cert(root), "--json")[1].strip() == "[]"
    # It is started from here; who supervises takes it up.
    code, _, told = run("federation", "start", "f", *cert(root), "--task", "none")
    assert (code, "give one of numbers (task)" in told) == (5, True)
    code, told, _ = run("federation", "start", "f", *cert(root), "--json")
    now = json.loads(told)
    assert (code, now["federation"], now["started"], now["by"]) == (0, "f", True, "root")
    found = json.loads(run("federation", "status", "f", *cert(site), "--json")[1])
    assert (found["running"], found["service"]["port"]) == (False, now["port"])
    told = run("federation", "status", folder)[1]
    assert f"not at work; started on port {now['port']}, task numbers, by root" in told
    code, _, told = run("federation", "start", "f", *cert(root))
    assert (code, "started already" in told) == (5, True)
    # A new certificate; and none any more.
    assert run("client", "rotate", *cert(site))[0] == 0
    assert run("client", "join", "f", *cert(site), "--leave")[0] == 0
    assert run("peers", "revoke", "site", *cert(root), "--reason", "left")[0] == 0
    code, _, told = run("federation", "status", "f", *cert(site))
    assert (code, "revoked" in told) == (5, True)
    rows = json.loads(run("peers", "list", *cert(root), "--json")[1])
    assert {row["name"] for row in rows if row["revoked"]} == {"site"}
    audit = [json.loads(line) for line in run("peers", "audit", *cert(root))[1].splitlines()]
    assert [row["code"] for row in audit if row["outcome"] == "refused"] == [
        "token-used", "exists", "config", "role", "task", "started", "revoked",
    ]  # fmt: skip
    # Nobody there.
    code, _, told = run(
        "federation", "status", "f", *cert(root), "--api", f"localhost:{free_port()}"
    )
    assert (code, "does not answer" in told) == (6, True)
    assert run("federation", "status", "f", *cert(tmp_path / "none"))[0] == 2


def test_what_is_no_fleet_is_one_line(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "api.toml"
    path.write_text('federations = "federations"\n')
    code, _, told = run("coordinator", "up", path)
    assert (code, "has no [flower]" in told, told.count("\n")) == (2, True, 1)
    path.write_text(
        'federations = "none"\n[flower]\nports = [9, 8]\ninsecure = true\n[flower.tasks.a]\n'
        'task = "a.b:C"\n'
    )
    code, _, told = run("coordinator", "up", path)
    assert (code, "ports are the first and the last" in told, told.count("\n")) == (2, True, 1)
    path.write_text(path.read_text().replace("[9, 8]", "[8, 9]"))
    code, _, told = run("coordinator", "up", path)
    assert (code, "is no folder" in told, told.count("\n")) == (2, True, 1)

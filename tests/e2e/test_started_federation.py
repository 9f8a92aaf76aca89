"""A federation is created and started over the API; `coordinator up` runs it on a SuperLink."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from benchmarks.loopback import LIGHT_APP, PYTHON_PATH, TASK, Loopback

from anabranch.client.api.caller import Caller
from anabranch.client.api.credentials import Credentials, Invitation
from anabranch.client.api.enrolling import enrol
from anabranch.coordinator.api.config import load_api
from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.peers import Grant
from anabranch.coordinator.api.server import ApiServer, serving
from anabranch.coordinator.federation import FEDERATION_FILE, START_FOLDER
from anabranch.coordinator.supervision import processes
from anabranch.wire.v1 import coordinator_pb2 as pb

NODES = 2
PATIENCE_S = 240.0


def admin_of(server: ApiServer, folder: Path) -> Caller:
    """An admin's connection."""
    grant = Grant(Identity("host", "root", Role.ADMIN), ("*",))
    token, _ = server.peers.invite(grant, 60)
    address = f"localhost:{server.port}"
    invitation = Invitation(token, server.authority.pem, address, f"localhost:{server.enrol_port}")
    enrol(invitation, folder, None)
    return Caller(address, Credentials(folder), timeout_s=60)


def created(folder: Path, keys: Path) -> Any:
    """What creating a federation of a folder sends."""
    settings = tomllib.loads((folder / FEDERATION_FILE).read_text())
    # Where it is kept is decided on the coordinator's machine.
    del settings["store"]
    header = pb.CreateHeader(federation="loopback", config=tomli_w.dumps(settings))
    yield pb.CreateRequest(header=header)
    files = [(path.name, path) for path in sorted((folder / START_FOLDER).iterdir())]
    files += [(f"nodes/{path.name}", path) for path in sorted(keys.glob("*.pub"))]
    for name, path in files:
        yield pb.CreateRequest(file=pb.StartFile(name=name, data=path.read_bytes()))


def ups(folder: Path) -> subprocess.Popen[bytes]:
    """`coordinator up` with the API's configuration, as systemd starts it."""
    arguments = ["-m", "anabranch.cli", "coordinator", "up", str(folder / "api.toml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHON_PATH}
    with (folder / "up.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments, "--log-format", "json"], stderr=log, env=env
        )


@pytest.mark.e2e
@pytest.mark.skipif("CHAOS_KILLS" not in os.environ, reason="a minute; make chaos runs it")
def test_rounds_are_run_of_a_federation_that_was_started_over_the_api(tmp_path: Path) -> None:
    # Its nodes are those of a loopback federation, which is otherwise not run.
    loop = Loopback(tmp_path, NODES, rounds=1, deadline_s=600, join_timeout_s=600)
    (tmp_path / "federations").mkdir()
    settings = {
        "federations": "federations", "port": 0, "enrol_port": 0,
        "flower": {
            "ports": [loop.port, 65535], "client_app": LIGHT_APP, "start_s": 600,
            "tls": {"certificate": "server.pem", "key": "server.key", "authority": "ca.pem"},
            "tasks": {"numbers": {"task": TASK, "task_params": loop.params}},
        },
    }  # fmt: skip
    (tmp_path / "api.toml").write_text(tomli_w.dumps(settings))
    home = tmp_path / "federations" / "loopback"
    up = ups(tmp_path)
    try:
        with (
            serving(load_api(tmp_path / "api.toml")) as server,
            admin_of(server, tmp_path / "root") as admin,
        ):

            def status() -> Any:
                time.sleep(0.3)  # what is waited for takes seconds
                return admin.call("Federations.Status", pb.StatusRequest(federation="loopback"))

            def wait(until: Callable[[], bool], what: str) -> None:
                loop.wait(until, PATIENCE_S, what)

            admin.call(
                "Federations.Create", created(loop.federation, tmp_path / "nodes"), wait=True
            )
            shutil.rmtree(loop.federation)
            loop.federation = home
            request = pb.StartRequest(federation="loopback")
            loop.port = admin.call("Federations.Start", request, wait=True).service.port
            wait(lambda: status().running, "it is kept at work")
            wait(lambda: loop.pid("superlink") is not None, "it has a SuperLink")
            # Killed with everything it started, and started again: it goes on by itself.
            up.send_signal(signal.SIGKILL)
            up.wait()
            wait(lambda: not status().running, "its supervisor went along")
            up = ups(tmp_path)
            for index in range(NODES):
                loop.start_node(index)
            wait(lambda: status().state == "collecting", "a round collects")
            assert status().service.port == loop.port
            wait(lambda: not status().service.started, "its rounds are over")
            found = status()
            assert (found.done, found.published) == (1, 1)
            assert found.service.why == "all 1 rounds are over"
            up.send_signal(signal.SIGTERM)
            assert up.wait(60) == 4
    finally:
        up.kill()
        up.wait()
        processes.kill_marked(str(home.resolve()))
        loop.close()

"""The rival: the same updates through a SuperLink to a ServerApp, on loopback.

The SuperLink keeps its state in memory, its default: with ``--database`` it answers so many at once
with "database is locked", and loses replies.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from anabranch.coordinator.api.authority import Authority
from anabranch.coordinator.flower import (
    command,
    environment,
    flwr,
    free_port,
    process,
    wait_for_port,
    write_bundle,
)
from benchmarks.load import material
from benchmarks.load.ours import Load, Outcome, generate, outcome
from benchmarks.load.watching import watched

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Reached:
    """What came as far as the ServerApp.

    Attributes:
        updates_per_s: From the first upload's start until the last was there.
        lost: Replies it was told are not to be had.
    """

    updates_per_s: float
    lost: int


def take(root: Path, load: Load) -> tuple[Outcome, Reached]:
    """Let every client send its update in one run.

    Args:
        root: A new folder.
        load: How many upload how much.

    Returns:
        What came of it, as far as the SuperLink; and as far as the ServerApp.
    """
    port = free_port()
    env = environment(root / "flower", port)
    # Flower starts the ServerApp, which is a module of this folder.
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    tls = _tls(root)
    link = {"address": f"127.0.0.1:{port}", "root-certificates": str(root / "ca.pem")}
    (root / "flower").mkdir()
    (root / "flower" / "config.toml").write_text(tomli_w.dumps({"superlink": {"link": link}}))
    told = root / "told.json"
    bundle = write_bundle(
        root / "bundle",
        {"clients": load.clients, "told": str(told)},
        "benchmarks.load.flower_app:app",
        "benchmarks.plain_flower:client_app",
    )
    plan = material.plan(load.clients, load.entries, 1)
    update = root / "update.bin"
    update.write_bytes(material.update(plan, load.entries))
    spec = root / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "address": f"127.0.0.1:{port}", "ca": str(root / "ca.pem"),
                "clients": load.clients, "update": str(update), "at_once": load.at_once,
            }
        )
    )  # fmt: skip
    arguments = [command("flower-superlink"), *tls, "--port", str(port)]
    arguments.append("--disable-runtime-dependency-installation")
    log = root / "superlink.log"
    with process(arguments, log, env) as superlink:
        wait_for_port(port, superlink, log)
        flwr(["run", str(bundle), "link"], env)
        with watched(superlink.pid) as seen:
            found = generate(
                [sys.executable, "-m", "benchmarks.load.flower_clients", str(spec)], env
            )
            end = time.monotonic() + TIMEOUT_S
            while not told.exists() and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(0.2)
    reached = json.loads(told.read_text())
    whole = load.clients - reached["lost"]
    assert abs(reached["bytes"] - whole * found["size_bytes"]) <= whole * 64
    rate = whole / (reached["ended"] - found["began"])
    return outcome(found, seen), Reached(rate, reached["lost"])


def _tls(root: Path) -> list[str]:
    authority = Authority(root)
    key, certificate = authority.server_pair(("localhost", "127.0.0.1"))
    for name, data in (("server.key", key), ("server.pem", certificate)):
        (root / name).write_bytes(data)
    return [
        "--ssl-certfile", str(root / "server.pem"), "--ssl-keyfile", str(root / "server.key"),
        "--ssl-ca-certfile", str(root / "ca.pem"),
    ]  # fmt: skip

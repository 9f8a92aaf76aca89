"""Lines between deployed SuperNodes and their SuperLink are cut, in each round otherwise.

Real processes on loopback, or in network namespaces, and minutes of them: ``make chaos`` runs it,
``make test`` does not. ``CHAOS_NODES`` sets how many nodes, ``CHAOS_SLOW`` how many times as long
as on an idle machine everything may take.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, PARAMS, TASK, check, config, opened, template
from tests.chaos.line import Line
from tests.chaos.namespaces import Bridge, why_not

from anabranch.coordinator.federation import START_FOLDER, write_federation
from anabranch.coordinator.flower import (
    command,
    environment,
    flwr,
    free_port,
    process,
    wait_for_port,
    wait_for_run,
    write_bundle,
)
from anabranch.vectors import seeded_start
from anabranch.vectors.peft_folder import write_adapter

LONG = int(os.environ.get("CHAOS_RUNS", "1")) > 1
NODES = int(os.environ.get("CHAOS_NODES", CLIENTS))
SLOW = float(os.environ.get("CHAOS_SLOW", "1"))
BRIEF_S = 8.0
GONE_S = 75.0
"""Flower takes a node of which it hears nothing for a minute for gone."""


@dataclass(frozen=True)
class Way:
    """How a node reaches its SuperLink.

    Attributes:
        address: Where it finds it.
        within: What its command begins with.
        set: Breaks it, and mends it.
    """

    address: str
    within: tuple[str, ...]
    set: Callable[[str], None]


@dataclass(frozen=True)
class Ways:
    """The network between a SuperLink and its nodes.

    Attributes:
        host: Where the SuperLink listens.
        cuts: What breaks in each round, and for how many seconds.
        fault: The same in words.
        to: Makes a node's way to a port of the SuperLink.
    """

    host: str
    cuts: tuple[tuple[str, float], ...]
    fault: str
    to: Callable[[int], Way]


@pytest.fixture(params=["proxies", "namespaces"])
def ways(request: pytest.FixtureRequest) -> Iterator[Ways]:
    """Lines through this process, which can end too; or real links, which only go silent."""
    with ExitStack() as stack:
        if request.param == "proxies":
            host = "127.0.0.1"

            def to(port: int) -> Way:
                line = stack.enter_context(Line(port))
                return Way(f"{host}:{line.port}", (), line.set)  # type: ignore[arg-type]

            cuts = tuple((state, BRIEF_S) for state in ("cut", "dead", "deaf", "dumb"))
            fault = "lines between SuperNodes and SuperLink ended, or silent in some direction"
            yield Ways(host, cuts, fault, to)
            return
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        bridge = stack.enter_context(Bridge())

        def beyond(port: int) -> Way:
            network = bridge.network()
            within = ("ip", "netns", "exec", network.name)
            return Way(f"{bridge.here}:{port}", within, network.set)  # type: ignore[arg-type]

        cuts = (("dead", BRIEF_S), ("deaf", BRIEF_S), ("dumb", BRIEF_S), ("dead", GONE_S))
        fault = "links down, or silent in some direction, between the namespaces of SuperNodes and "
        yield Ways(bridge.here, cuts, f"{fault}SuperLink", beyond)


def server(name: str, *words: str) -> list[str]:
    """One of Flower's servers, as patient as the machine is slow."""
    if SLOW <= 1:
        return [command(name), *words]
    return [sys.executable, str(Path(__file__).with_name("slow_flower.py")), str(30 * SLOW),
            name, *words]  # fmt: skip


@pytest.mark.skipif(not LONG, reason="minutes of real processes; make chaos")
def test_lines_between_nodes_and_their_superlink_that_are_cut(
    ways: Ways, tmp_path: Path, told: Told
) -> None:
    cfg = config(
        rounds=len(ways.cuts), clients=NODES, quorum=NODES, poll_s=1, deadline_s=240 * SLOW,
        join_timeout_s=240 * SLOW, train={"steps": 20},
    )  # fmt: skip
    federation = tmp_path / "federation"
    write_federation(cfg, federation)
    write_adapter(seeded_start(template(), cfg.seed), federation / START_FOLDER)
    home, port = tmp_path / "flower", free_port()
    home.mkdir()
    env = environment(home, port)
    link = {"superlink": {"link": {"address": f"{ways.host}:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(link))
    with ExitStack() as running:
        log = tmp_path / "superlink.log"
        superlink = running.enter_context(
            process(
                server(
                    "flower-superlink", "--insecure", "--host", ways.host, "--port", str(port),
                    "--disable-runtime-dependency-installation",
                ),
                log, env,
            )
        )  # fmt: skip
        wait_for_port(port, superlink, log, 120 * SLOW, ways.host)
        lines = [ways.to(port) for _ in range(NODES)]
        for index, line in enumerate(lines):
            node_home = tmp_path / f"home-{index}"
            settings = f"partition-id={index} num-partitions={NODES} state='{node_home}/state'"
            running.enter_context(
                process(
                    [
                        *line.within,
                        *server(
                            "flower-supernode", "--insecure", "--superlink", line.address,
                            "--port", str(free_port()), "--node-config", settings,
                        ),
                    ],
                    tmp_path / f"node-{index}.log",
                    {**env, "FLWR_HOME": str(node_home), "OMP_NUM_THREADS": "1"},
                )
            )  # fmt: skip
        bundle = write_bundle(
            tmp_path / "bundle",
            {"federation": str(federation), "task": TASK, "task-params": PARAMS},
        )
        run_id = str(flwr(["run", str(bundle), "link"], env)["run-id"])
        store = running.enter_context(closing(opened(cfg, federation)))
        broken: dict[int, float] = {}
        mended: set[int] = set()

        def break_and_mend() -> None:
            """Half of the lines, once a round has its orders out; each for some seconds."""
            now = time.monotonic()
            for row in store.notes("state"):
                number = row["round"]
                if row["state"] == "collecting" and number not in broken:
                    broken[number] = now
                    told.broke()
                    for line in lines[number % 2 :: 2]:
                        line.set(ways.cuts[number - 1][0])
            for number, since in broken.items():
                if number not in mended and now - since > ways.cuts[number - 1][1]:
                    mended.add(number)
                    for line in lines[number % 2 :: 2]:
                        line.set("open")

        wait_for_run(run_id, "link", env, tmp_path / "run.log", 580 * SLOW, break_and_mend)
        assert list(broken) == list(range(1, len(ways.cuts) + 1))
    check(cfg, federation)
    told.outcome(
        ways.fault,
        "the clients answer once their line is back; nothing lost, nothing counted twice",
    )

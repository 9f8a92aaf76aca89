"""Lines between deployed SuperNodes and their SuperLink are cut, in each round otherwise.

Real processes on loopback, and minutes of them: ``make chaos`` runs it, ``make test`` does not.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import tomli_w
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, PARAMS, TASK, check, config, opened, template
from tests.chaos.line import Line, State

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
STATES: tuple[State, ...] = ("cut", "dead", "deaf", "dumb")
CUT_S = 8.0
NODES = int(os.environ.get("CHAOS_NODES", CLIENTS))


@pytest.mark.skipif(not LONG, reason="minutes of real processes; make chaos")
def test_lines_between_nodes_and_their_superlink_that_are_cut(tmp_path: Path, told: Told) -> None:
    cfg = config(
        rounds=len(STATES),
        clients=NODES,
        quorum=NODES,
        poll_s=0.2,
        deadline_s=240,
        join_timeout_s=240,
        train={"steps": 20},
    )
    federation = tmp_path / "federation"
    write_federation(cfg, federation)
    write_adapter(seeded_start(template(), cfg.seed), federation / START_FOLDER)
    home, port = tmp_path / "flower", free_port()
    home.mkdir()
    env = environment(home, port)
    link = {"superlink": {"link": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(link))
    with ExitStack() as running:
        log = tmp_path / "superlink.log"
        superlink = running.enter_context(
            process(
                [
                    command("flower-superlink"), "--insecure", "--port", str(port),
                    "--disable-runtime-dependency-installation",
                ],
                log, env,
            )
        )  # fmt: skip
        wait_for_port(port, superlink, log, 120)
        lines = [running.enter_context(Line(port)) for _ in range(NODES)]
        for index, line in enumerate(lines):
            running.enter_context(
                process(
                    [
                        command("flower-supernode"), "--insecure",
                        "--superlink", f"127.0.0.1:{line.port}", "--port", str(free_port()),
                        "--node-config", f"partition-id={index} num-partitions={CLIENTS}",
                    ],
                    tmp_path / f"node-{index}.log",
                    {**env, "FLWR_HOME": str(tmp_path / f"home-{index}"), "OMP_NUM_THREADS": "1"},
                )
            )  # fmt: skip
        bundle = write_bundle(
            tmp_path / "bundle",
            {"federation": str(federation), "task": TASK, "task-params": PARAMS},
        )
        run_id = str(flwr(["run", str(bundle), "link"], env)["run-id"])
        store = running.enter_context(closing(opened(cfg, federation)))
        broken: dict[int, float] = {}

        def break_and_mend() -> None:
            """Half of the lines, once a round has its orders out; each for some seconds."""
            now = time.monotonic()
            for row in store.notes("state"):
                number = row["round"]
                if row["state"] == "collecting" and number not in broken:
                    broken[number] = now
                    told.broke()
                    for line in lines[number % 2 :: 2]:
                        line.set(STATES[number - 1])
            if broken and now - max(broken.values()) > CUT_S:
                for line in lines:
                    line.set("open")

        wait_for_run(run_id, "link", env, tmp_path / "run.log", 580, break_and_mend)
        assert list(broken) == list(range(1, len(STATES) + 1))
    check(cfg, federation)
    told.outcome(
        "lines between SuperNodes and SuperLink ended, or silent in one or both directions",
        "the clients answer once their line is back; nothing lost, nothing counted twice",
    )

"""Lives of one coordinator, each ended by kill -9: ``python coordinator.py FOLDER SEED KILLS``.

A real coordinator on a real store (SQLite, artifacts in a folder), four clients in its process.
Each life is a fork, so that Python and what it loads start once. Half of them kill themselves
before or after the n-th thing they do to the store, the others are killed from outside after a
share of the time that a whole run takes; ``n`` and the share are drawn from the seed. The last life
is left alone. Prints what each life came to, as JSON lines.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from anabranch.client.app import app as client_app
from anabranch.client.session import open_session
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.simulation.engine.identity import server_identity
from anabranch.simulation.engine.inprocess import InProcessGrid

TASK = "anabranch.simulation.synthetic:SyntheticTask"
PARAMS = '{"clients": 4}'
ROUNDS = 4
STEPS = ("put", "admit", "refuse", "publish", "abandon", "note", "tidy")
"""What is done to a store, and may be what a life ends before or after."""


def config() -> FederationConfig:
    """Four clients, no residuals: those live in client processes, which die here too."""
    return FederationConfig.model_validate(
        {
            "name": "chaos", "run": "r", "rounds": ROUNDS, "clients": 4, "quorum": 4, "poll_s": 0,
            "durable": False, "train": {"steps": 2}, "recipe": {"method": "median"},
            "codec": {"name": "ternary", "density": 0.2, "feedback": 0.0},
        }
    )  # fmt: skip


def opened(folder: Path) -> Store:
    """Its store."""
    cfg = config()
    return open_store(cfg.store, folder, federation=cfg.name, run=cfg.run, durable=cfg.durable)


def live(folder: Path, moment: Callable[[], None]) -> None:
    """Run what is left of the federation; ``moment`` is called before and after each step."""
    store = opened(folder)
    for name in STEPS:
        setattr(store, name, _watched(getattr(store, name), moment))
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10}, RecordDict(),
            {"task": TASK, "task-params": PARAMS},
        )
        for node in range(10, 14)
    }  # fmt: skip
    with server_identity():
        strategy = MergeStrategy(config(), open_session(TASK, PARAMS).template, store)
        strategy.start(InProcessGrid(client_app, contexts))


def _watched(step: Callable[..., Any], moment: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(step)
    def watched(*given: Any, **named: Any) -> Any:
        moment()
        found = step(*given, **named)
        moment()
        return found

    return watched


def main(folder: Path, seed: int, kills: int) -> None:
    """Let it live and die."""
    draw = random.Random(seed)
    # Loads what a life needs, and says how long a whole one takes.
    moments = 0

    def count() -> None:
        nonlocal moments
        moments += 1

    began = time.monotonic()
    live(folder / "whole", count)
    whole_s = time.monotonic() - began
    print(json.dumps({"moments": moments}), flush=True)
    for life in range(kills + 1):
        last, timed = life == kills, life % 2 == 1
        at, after_s = draw.randrange(1, moments), draw.uniform(0, whole_s / 2)
        child = os.fork()
        if child == 0:
            left = [at if not (last or timed) else -1]

            def die(left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            live(folder / "killed", die)
            os._exit(0)
        if timed and not last:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        print(json.dumps({"life": life, "signal": os.WTERMSIG(status), "timed": timed}), flush=True)


if __name__ == "__main__":
    for word in ("whole", "killed"):
        (Path(sys.argv[1]) / word).mkdir(parents=True)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

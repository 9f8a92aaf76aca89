"""A node takes each step of a round's secure aggregation once, whatever comes over the network.

Flower's context is no place to remember that: it is lost with the SuperNode, new in each run, and
read by whatever runs at the same time. A file beside the node's keys is none of that.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from filelock import FileLock

from anabranch.wire import WireError
from anabranch.wire.plan import RoundPlan

PHASES = ("advertise", "deal", "mask", "confirm", "open")


def take_step(path: Path, plan: RoundPlan, phase: str) -> None:
    """Note that a phase of a round is begun, before anything is said in it.

    Args:
        path: The node's file of steps; made when missing.
        plan: The round's.
        phase: One of ``PHASES``.

    Raises:
        WireError: ``phase``: it was begun before, or the one before it was not. A second try might
            be another lie, and an honest round is not asked twice: one that is interrupted is lost.
        ValueError: The file cannot be read or written.
    """
    run = hashlib.sha256(json.dumps([plan.federation, plan.run]).encode()).hexdigest()
    number = PHASES.index(phase)
    try:
        with FileLock(path.with_suffix(".lock")):
            steps = json.loads(path.read_text()) if path.exists() else {}
            last_round, last = steps.get(run, [0, len(PHASES)])
            if number == 0 and plan.round <= last_round:
                raise WireError(
                    "phase", f"this node takes part once in a round, and did in round {last_round}"
                )
            if number and (last_round, last) != (plan.round, number - 1):
                raise WireError(
                    "phase", f"this node cannot {phase} in round {plan.round} now, or did before"
                )
            steps[run] = [plan.round, number]
            fresh = path.with_suffix(".new")
            with fresh.open("w") as file:
                json.dump(steps, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} beside the node's keys cannot be kept: {error}") from error

"""kill -9 of what a deployed federation consists of: SuperLink, ServerApp, supervisor, a node.

``make chaos`` kills all of them, with TLS and four nodes; ``make test`` a ServerApp once.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks.loopback import Loopback
from benchmarks.recovery import FAULTS, campaign

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
NAMES = {
    "serverapp": "kill -9 of the ServerApp",
    "superlink": "kill -9 of the SuperLink",
    "up": "kill -9 of `coordinator up`",
    "node": "kill -9 of a SuperNode",
}
OUTCOME = "the same round goes on, whoever had answered is not asked again"
LOST = "the round closes with the others at its deadline, the node is back in the next one"


@pytest.mark.e2e
def test_a_killed_service_goes_on_with_the_same_round(tmp_path: Path, told: object) -> None:
    faults = list(FAULTS) * max(1, RUNS // 3) if RUNS > 1 else ["serverapp"]
    nodes = 4 if RUNS > 1 else 2
    loop = Loopback(
        tmp_path, nodes, tls=RUNS > 1, rounds=len(faults) + 1, deadline_s=40,
        quorum=nodes - 1 if RUNS > 1 else nodes,
    )  # fmt: skip
    found = campaign(loop, faults, seed=7)
    assert [one.fault for one in found] == faults
    for one in found:
        told.seen(NAMES[one.fault], LOST if one.fault == "node" else OUTCOME, one.seconds)  # type: ignore[attr-defined]

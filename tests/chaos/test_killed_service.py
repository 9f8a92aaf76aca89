"""kill -9 of what a deployed federation consists of: SuperLink, ServerApp, supervisor, a node.

``make chaos`` kills each of them, with TLS and four nodes. Flower's part of a round takes most of a
minute there, so ``make test`` kills processes that stand in for Flower's instead
(``tests/coordinator/supervision/test_supervisor.py``).
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
@pytest.mark.skipif(RUNS == 1, reason="make chaos: a round of Flower's takes most of a minute")
def test_a_killed_service_goes_on_with_the_same_round(tmp_path: Path, told: object) -> None:
    faults = list(FAULTS) * max(1, RUNS // 5)
    loop = Loopback(tmp_path, 4, rounds=len(faults) + 1, deadline_s=40, quorum=3)
    found = campaign(loop, faults, seed=7)
    assert [one.fault for one in found] == faults
    for one in found:
        outcome = LOST if one.fault == "node" else OUTCOME
        told.seen(NAMES[one.fault], outcome, one.seconds)  # type: ignore[attr-defined]

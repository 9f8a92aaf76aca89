"""kill -9 of a coordinator at seeded moments: the same rounds go on, and nothing counts twice.

``make chaos`` kills a hundred times; a short form runs in ``make test``.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.chaos.conftest import Told

from anabranch.coordinator.store import open_store
from anabranch.coordinator.store.opening import artifacts_of
from anabranch.coordinator.store.retention import sweep
from anabranch.wire.receipt import check_chain

SCRIPT = Path(__file__).with_name("coordinator.py")
KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
LIVES = 4
"""Kills in one run: a run is soon over, and another one begins in a fresh folder."""


@pytest.mark.parametrize("seed", range(max(1, KILLS // LIVES)))
def test_a_killed_coordinator_goes_on_with_the_same_round(
    seed: int, tmp_path: Path, told: Told
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(seed), str(LIVES)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert [row["signal"] for row in lives][-1] == 0
    assert sum(row["signal"] == 9 for row in lives) >= 1
    script = runpy.run_path(str(SCRIPT))
    cfg, rounds = script["config"](), script["ROUNDS"]
    killed, whole = (
        open_store(cfg.store, tmp_path / name, federation=cfg.name, run=cfg.run)
        for name in ("killed", "whole")
    )
    # The same rounds, with the same adapters, to the bit.
    assert [row.adapter_hash for row in killed.publications()] == [
        row.adapter_hash for row in whole.publications()
    ]
    assert [(row["round"], row["status"]) for row in killed.notes("round")] == [
        (number, "published") for number in range(1, rounds + 1)
    ]
    # Every admitted update counts once, by the rows and by the receipts.
    rows = Counter((row.round, row.client) for row in killed.contributions())
    assert rows == {
        (number, f"client-000{client}"): 1 for number in range(1, rounds + 1) for client in range(4)
    }
    receipts = check_chain(killed.receipts(), None)
    counted = Counter((one.round, one.client) for receipt in receipts for one in receipt.inputs)
    assert counted == rows
    # What was written and never named is swept up, and nothing else.
    kept = artifacts_of(cfg.store, tmp_path / "killed", durable=False)
    sweep(killed.engine, kept, grace_s=0.0)  # type: ignore[attr-defined]
    named = {row.digest for row in [*killed.contributions(), *killed.publications()]}
    assert {name for name, _ in kept.names()} == named
    killed.close()
    whole.close()
    told.outcome(
        "coordinator killed with -9 in a round, or between two steps of its store",
        "the same round goes on, to the same bits; nothing lost, nothing counted twice",
        runs=sum(row["signal"] == 9 for row in lives),
    )

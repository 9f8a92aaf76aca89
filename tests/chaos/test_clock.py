"""The clock is set by hours while a round collects: deadlines do not move, nobody is refused."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from tests.chaos.conftest import Told
from tests.chaos.federation import CLIENTS, check, config, run

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
HOURS = {"forward": 6 * 3600.0, "back": -6 * 3600.0}


@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize(
    ("where", "which"),
    [(where, which) for where in ("coordinator", "everywhere") for which in HOURS]
    if RUNS > 1
    else [("coordinator", "back"), ("everywhere", "back")],
)
def test_a_clock_that_is_set_by_hours(
    which: str, where: str, seed: int, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, off_s, right = random.Random(seed).randrange(1, CLIENTS), 0.0, time.time

    def moment(count: int) -> None:
        nonlocal off_s
        if count == CLIENTS + at:
            told.broke()
            off_s = HOURS[which]
        # Put right again once the round is over: a clock that stays wrong is refused by its nodes.
        if count > 2 * CLIENTS and where == "coordinator":
            off_s = 0.0

    def wrong() -> float:
        return right() + off_s

    if where == "everywhere":
        monkeypatch.setattr(time, "time", wrong)
    # An honest answer takes seconds; a deadline that followed the clock would be over, or never.
    cfg = config(signed=True, deadline_s=120)
    began_s = time.monotonic()
    run(cfg, tmp_path, moment, wall=wrong)
    assert time.monotonic() - began_s < 100
    check(cfg, tmp_path)
    told.outcome(
        f"clock set {which} by six hours while a round collects, {where}",
        "the round goes on to its own deadline; nobody is refused",
    )

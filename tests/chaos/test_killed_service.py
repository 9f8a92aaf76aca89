"""kill -9 of what a deployed federation consists of, at any moment, whatever is under way.

``make chaos`` kills a hundred times, with TLS, registered keys, four nodes and PostgreSQL. Flower's
part of a round takes most of a minute there, so ``make test`` kills processes that stand in for
Flower's instead (``tests/coordinator/supervision/test_supervisor.py``).
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks.loopback import Loopback
from benchmarks.recovery import check
from tests.chaos.conftest import Told
from tests.chaos.postgres import Postgres

from anabranch.coordinator.flower import free_port
from anabranch.coordinator.rounds.control import Want, ask
from anabranch.coordinator.store import StoreError

RUNS = int(os.environ.get("CHAOS_RUNS", "1"))
SEEDS = max(1, RUNS // 2)
KILLS, NODES = 20, 4
EVERY_S = 36.0
"""Longest time between two kills."""
DOWN_S = 4.0
"""Longest time that a killed database is away."""
START_S = 30.0
"""Longest time that `up` takes to its first look at the database."""
AWAY_S = 75.0
"""For so long a killed node may be turned away: SuperLink takes it for alive."""
HANG_S, LONGEST_S = 400.0, 1500.0
"""Longest time without a round's end, and of all of it."""
NAMES = {
    "serverapp": "kill -9 of the ServerApp",
    "superlink": "kill -9 of the SuperLink",
    "up": "kill -9 of `coordinator up`",
    "node": "kill -9 of a SuperNode with its ClientApp",
    "database": "kill -9 of PostgreSQL, away for up to four seconds",
}
OUTCOME = "every round ends, each update is counted once; whoever had answered is not asked again"


@dataclass
class Kill:
    """Who was killed, when, and in which round."""

    fault: str
    at_s: float
    round: int
    seconds: float = 0.0
    """Until that round was over."""


class Storm:
    """Kills, then drains.

    Args:
        loop: A fresh federation.
        server: Its database.
        seed: Of who is killed when.
    """

    def __init__(self, loop: Loopback, server: Postgres, seed: int) -> None:
        self._loop, self._server, self._draw = loop, server, random.Random(seed)
        self._store = loop.store()
        self._back_s: float | None = None
        self._was_back_s = -math.inf
        self._node_s = 0.0
        self.kills: list[Kill] = []

    def run(self) -> None:
        """Start everything, kill, and see that it came to what it must."""
        loop = self._loop
        try:
            loop.start()
            # Flower's node ends where its key is not registered yet.
            loop.wait(
                lambda: any(row["event"] == "submitted" for row in loop.changes()), 120.0, "a run"
            )
            for index in range(NODES):
                loop.start_node(index)
            rounds = self._weather()
            assert any(row["status"] == "published" for row in self._store.notes("round"))
            check(loop, self._store, rounds)
        finally:
            self._store.close()
            loop.close()

    def _weather(self) -> int:
        """Returns how many rounds there were."""
        began_s = next_s = moved_s = time.monotonic()
        done, drained = 0, False
        while True:
            now = time.monotonic()
            self._loop.tend()
            if self._back_s is not None and now > self._back_s:
                self._server.start()
                self._back_s, self._was_back_s = None, time.monotonic()
            if (code := self._up_ended()) == 0:
                break
            if code is not None:
                # Started while the database was away, it refuses to begin; systemd tries again.
                away = self._back_s is not None or now - self._was_back_s < START_S
                assert away, self._loop.logs()
                time.sleep(1.0)
                self._loop.start()
            over = self._over(done)
            for one in self.kills:
                if not one.seconds and one.round <= over:
                    one.seconds = now - one.at_s
            if over > done:
                done, moved_s = over, now
            assert now - moved_s < HANG_S, self._loop.logs()
            assert now - began_s < LONGEST_S, self._loop.logs()
            if now > next_s and len(self.kills) < KILLS and self._kill(done + 1):
                next_s = now + self._draw.uniform(0.0, EVERY_S)
            # Not before the round in which the last one was killed is over.
            if len(self.kills) == KILLS and self.kills[-1].seconds and not drained:
                ask(self._store, Want.DRAIN)
                drained = True
            time.sleep(0.1)
        return len(self._store.notes("round"))

    def _up_ended(self) -> int | None:
        """How `up` ended; None while it runs."""
        assert self._loop.up is not None
        return self._loop.up.poll()

    def _over(self, done: int) -> int:
        """How many rounds are over, as far as the database says."""
        if self._back_s is not None:
            return done
        try:
            return len(self._store.notes("round"))
        except StoreError:
            return done

    def _kill(self, number: int) -> bool:
        """Kill whoever is drawn; False where it is not there."""
        loop, fault = self._loop, self._draw.choice(list(NAMES))
        now = time.monotonic()
        if fault == "database":
            if self._back_s is not None:
                return False
            self._server.kill()
            self._back_s = now + self._draw.uniform(0.0, DOWN_S)
        elif fault == "node":
            # A quorum of three needs the others.
            if now - self._node_s < AWAY_S:
                return False
            index = self._draw.randrange(NODES)
            if index not in loop.running:
                return False
            loop.kill_node(index)
            loop.start_node(index)
            self._node_s = now
        elif not loop.kill(fault):
            return False
        elif fault == "up":
            loop.start()
        self.kills.append(Kill(fault, now, number))
        return True


@pytest.mark.e2e
@pytest.mark.skipif(RUNS == 1, reason="make chaos: a round of Flower's takes most of a minute")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_service_that_is_killed_at_any_moment(seed: int, tmp_path: Path, told: Told) -> None:
    with Postgres(free_port()) as server:
        loop = Loopback(
            tmp_path, NODES, rounds=1000, deadline_s=40, quorum=NODES - 1,
            store={"url": server.database(), "patience_s": 60},
        )  # fmt: skip
        storm = Storm(loop, server, seed)
        storm.run()
    for one in storm.kills:
        told.seen(NAMES[one.fault], OUTCOME, one.seconds)

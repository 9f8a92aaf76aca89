"""What each fault came to is gathered, and kept where ``CHAOS_RECORD`` is set."""

from __future__ import annotations

import os
import time

import pytest
from benchmarks.chaos import Fault, record

_SEEN: dict[str, Fault] = {}


class Told:
    """One fault's run: when it broke, and what came of it."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def broke(self) -> None:
        """It breaks now."""
        self._began_s = time.monotonic()

    def outcome(self, fault: str, outcome: str, runs: int = 1) -> None:
        """The run is over, and all that must be true of it is."""
        self.seen(fault, outcome, time.monotonic() - self._began_s, runs)

    def seen(self, fault: str, outcome: str, seconds: float, runs: int = 1) -> None:
        """The same of a fault that was timed elsewhere."""
        before = _SEEN.get(fault)
        _SEEN[fault] = Fault(
            fault=fault,
            runs=runs + (before.runs if before else 0),
            outcome=outcome,
            seconds=round(max(seconds, before.seconds if before else 0.0), 1),
        )


@pytest.fixture
def told() -> Told:
    """Takes down what a fault came to."""
    return Told()


def pytest_sessionfinish() -> None:
    """Keep it."""
    if os.environ.get("CHAOS_RECORD") and _SEEN:
        record(_SEEN.values())

"""What an operator asks of a running federation, by way of its store: the latest word counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

from anabranch.coordinator.store import Store

EVENT = "control"
"""The kind of note that holds it."""

LOOK_S = 1.0
"""Seconds between two looks at the store."""


class Want(StrEnum):
    """What is asked."""

    RUN = "run"
    PAUSE = "pause"
    """No further round begins, and the clock of the one under way stands still."""
    DRAIN = "drain"
    """The round under way closes with what it holds, and the run ends after it."""
    ABORT = "abort"
    """The round under way is abandoned, and the run ends."""
    STOP = "stop"
    """The round under way closes if it holds its quorum, and else stays as it is; the run ends, and
    the next one goes on there."""


def ask(store: Store, want: Want, by: str = "operator") -> None:
    """Ask it of whoever runs this store's federation, or will: a pause outlasts a restart."""
    store.note(EVENT, {"want": want.value, "by": by})


def latest(store: Store) -> Want:
    """What was asked last."""
    row = store.last_note(EVENT)
    return Want(row["want"]) if row else Want.RUN


def ends(store: Store) -> Want | None:
    """A drain or an abort that no run has ended for yet."""
    row = store.last_note(EVENT)
    if row is None or row["want"] not in (Want.DRAIN, Want.ABORT) or row.get("heeded"):
        return None
    return Want(row["want"])


def heeded(store: Store) -> None:
    """A run has ended, as was asked: the next one need not."""
    if (want := ends(store)) is not None:
        store.note(EVENT, {"want": want.value, "by": "coordinator", "heeded": True})


class Control:
    """The operator's wish, looked up no more than once a second.

    Args:
        store: The federation's.
        clock: Monotonic seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._looked_s = -LOOK_S
        self._want = Want.RUN

    def begin(self) -> None:
        """A run begins: what ended the last one is done with, and a pause before that holds.

        A drain or an abort that nothing has heeded yet holds as well.
        """
        rows = [Want(row["want"]) for row in self._store.notes(EVENT)]
        if not rows or rows[-1] in (Want.RUN, Want.PAUSE) or ends(self._store) is not None:
            return
        before = [want for want in rows if want is not Want.STOP]
        paused = rows[-1] is Want.STOP and before[-1:] == [Want.PAUSE]
        ask(self._store, Want.PAUSE if paused else Want.RUN, "coordinator")

    def want(self) -> Want:
        """What is asked now."""
        if self._clock() - self._looked_s >= LOOK_S:
            self._want, self._looked_s = latest(self._store), self._clock()
        return self._want

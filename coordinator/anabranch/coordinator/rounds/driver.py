"""Drives one round's machine: reads the clock and the operator's wish, and notes each state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from anabranch.coordinator.collect import Closed
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.control import Control, Want
from anabranch.coordinator.rounds.machine import (
    Abort,
    Admitted,
    Asked,
    Back,
    Drain,
    Event,
    Gone,
    Lost,
    Pause,
    Resume,
    Round,
    State,
    Terms,
    Tick,
    step,
)
from anabranch.coordinator.store import Store

EVENT = "state"
"""The kind of note that tells where a round stands."""


class SuspendedError(Exception):
    """The run is to end now, and its round to go on in the next one."""


def terms_of(config: FederationConfig, deadline_s: float) -> Terms:
    """What a federation holds its rounds to."""
    policy = config.collect
    return Terms(
        quorum=config.quorum,
        deadline_s=deadline_s,
        quorum_fraction=policy.quorum_fraction,
        close_at=policy.close_at,
        progress_s=policy.progress_s,
        cap_s=policy.latest_s(deadline_s),
    )


def was_closed(store: Store, number: int) -> bool:
    """Whether a round had closed when its coordinator stopped: its cohort then stands."""
    return any(row["round"] == number and row["state"] == "merging" for row in store.notes(EVENT))


class Driver:
    """One round on its way.

    Args:
        number: Which.
        terms: What it is held to.
        store: Where its states are noted before anything is done about them.
        control: What the operator asks.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        number: int,
        terms: Terms,
        store: Store,
        control: Control,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._control, self._clock = store, control, clock
        self.round = Round(number, terms)

    @property
    def seconds(self) -> float:
        """How long it has been collecting, without the time it was paused."""
        return self._clock() - self.round.began_s

    def asked(self, waiting: int, admitted: int, owed: int = 0) -> None:
        """Orders went to so many clients, beside the updates that are held already, or owed."""
        self.happen(Asked(self._clock(), waiting, admitted, owed))

    def admitted(self, late: bool, replaces: bool = False, beside: bool = False) -> None:
        """An update counts: an earlier round's, in another's place, or of a client given up."""
        if self.round.state is State.COLLECTING:
            self.happen(Admitted(self._clock(), late, replaces, beside))

    def lost(self, late: bool = False) -> None:
        """A client will not contribute what it was asked for, in an earlier round if late."""
        if self.round.state is State.COLLECTING:
            self.happen(Lost(late))

    def gone(self) -> None:
        """A client's order or reply was lost on its way; it may be asked again."""
        if self.round.state is State.COLLECTING:
            self.happen(Gone())

    def back(self) -> None:
        """One that was gone has an order again, or its update is here."""
        if self.round.state is State.COLLECTING:
            self.happen(Back())

    def closed(self) -> Closed | None:
        """Why nothing more is waited for; None while the round collects.

        Raises:
            SuspendedError: The coordinator is to stop, and the round is below its quorum.
        """
        if self.round.state is State.COLLECTING:
            self._heed(self._control.want())
        if self.round.state is State.COLLECTING:
            self.happen(Tick(self._clock()))
        if self.round.state is State.COLLECTING:
            return None
        if self._clock() >= self.round.ends_s or math.isinf(self.round.ends_s):
            return Closed("deadline", f"no reply within {self.seconds:.3g} s")
        return Closed("closed", f"the round closed at {self.round.admitted} updates")

    def happen(self, event: Event) -> None:
        """Take an event, and note a state that a restart must know of."""
        before, self.round = self.round, step(self.round, event)
        if self.round.state is not before.state and not self.round.over:
            facts = {"round": self.round.number, "state": self.round.state.value}
            self._store.note(EVENT, facts)

    def _heed(self, want: Want) -> None:
        if want is Want.PAUSE and self.round.paused_s is None:
            self.happen(Pause(self._clock()))
        elif want is not Want.PAUSE and self.round.paused_s is not None:
            self.happen(Resume(self._clock()))
        if want is Want.STOP and self.round.admitted < self.round.needed:
            raise SuspendedError
        if want in (Want.DRAIN, Want.STOP):
            self.happen(Drain())
        elif want is Want.ABORT:
            self.happen(Abort("aborted by the operator"))

"""A round as states, events and one table of transitions: pure, so that every path can be tested.

::

    planned → collecting → merging → gating → published
                   ↘           ↘         ↘ abandoned

``step`` first counts what an event tells, then takes the first row of ``TABLE`` whose guard holds.
Times are seconds of one monotonic clock, which the caller reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    """Where a round stands."""

    PLANNED = "planned"
    COLLECTING = "collecting"
    MERGING = "merging"
    GATING = "gating"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


OVER = (State.PUBLISHED, State.ABANDONED)
"""States that nothing leads out of."""


@dataclass(frozen=True)
class Terms:
    """What a round is held to.

    Attributes:
        quorum: Fewest admitted updates that are merged.
        quorum_fraction: The same as a share of the clients asked; the larger counts.
        close_at: Admitted updates at which it closes; None waits for all.
        deadline_s: Seconds until it closes in any case.
        progress_s: Seconds that an admitted update leaves the others at least.
        cap_s: Seconds beyond which progress does not move the deadline.
    """

    quorum: int
    deadline_s: float
    quorum_fraction: float = 0.0
    close_at: int | None = None
    progress_s: float = 0.0
    cap_s: float = math.inf


@dataclass(frozen=True)
class Round:
    """A round at one moment.

    Attributes:
        number: Which.
        terms: What it is held to.
        state: Where it stands.
        asked: Clients whose update it waits for or holds.
        admitted: Updates it holds.
        lost: Clients that will not answer in it: refused or failed.
        gone: Clients whose order was lost with their node, or on its way: they may be back.
        owed: Updates of earlier rounds that are still to come, and would count in it.
        began_s: When it was asked for.
        ends_s: Its deadline, as it stands.
        paused_s: Since when its clock stands still; None while it runs.
        reason: Why it was abandoned.
    """

    number: int
    terms: Terms
    state: State = State.PLANNED
    asked: int = 0
    admitted: int = 0
    lost: int = 0
    gone: int = 0
    owed: int = 0
    began_s: float = 0.0
    ends_s: float = math.inf
    paused_s: float | None = None
    reason: str = ""

    @property
    def needed(self) -> int:
        """Its quorum."""
        return max(self.terms.quorum, math.ceil(self.terms.quorum_fraction * self.asked))

    @property
    def over(self) -> bool:
        """Whether nothing will change it any more."""
        return self.state in OVER


@dataclass(frozen=True)
class Asked:
    """The orders are out: to so many clients, beside updates held already, and those owed."""

    at_s: float
    waiting: int
    admitted: int = 0
    owed: int = 0


@dataclass(frozen=True)
class Admitted:
    """An update is safe in the store, and counts.

    Attributes:
        at_s: When.
        late: It is an earlier round's.
        replaces: Another of its client counted until then, and does no more.
        beside: Its client was given up before.
    """

    at_s: float
    late: bool = False
    replaces: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Lost:
    """A client will not contribute, to an earlier round if late: refused, or no reply will come."""

    late: bool = False


@dataclass(frozen=True)
class Gone:
    """A client's order, or its reply, was lost on its way: a quorum does not wait for it."""


@dataclass(frozen=True)
class Back:
    """A client that was gone has an order again, or its update came otherwise."""


@dataclass(frozen=True)
class Tick:
    """Time goes by."""

    at_s: float


@dataclass(frozen=True)
class Pause:
    """An operator stops the clock; updates on their way are still admitted."""

    at_s: float


@dataclass(frozen=True)
class Resume:
    """The clock runs on: the deadline moves by as long as it stood."""

    at_s: float


@dataclass(frozen=True)
class Drain:
    """An operator wants the round closed with what it holds."""


@dataclass(frozen=True)
class Abort:
    """An operator wants the round abandoned."""

    reason: str


@dataclass(frozen=True)
class Merged:
    """There is a candidate, kept in the store."""


@dataclass(frozen=True)
class Failed:
    """The cohort could not be merged."""

    reason: str


@dataclass(frozen=True)
class Passed:
    """The candidate may serve, and does: the store holds it as published."""


@dataclass(frozen=True)
class Rejected:
    """The gate keeps the adapter in service."""

    reason: str


Event = (
    Asked | Admitted | Lost | Gone | Back | Tick | Pause | Resume | Drain | Abort
    | Merged | Failed | Passed | Rejected
)  # fmt: skip


class NotAllowedError(ValueError):
    """An event that cannot happen in this state."""


Guard = Callable[["Round", Event], bool]


def _always(now: Round, event: Event) -> bool:
    return True


def _quorate(now: Round, event: Event) -> bool:
    return now.admitted >= now.needed


def _complete(now: Round, event: Event) -> bool:
    """All have answered, or as many as it closes at."""
    enough = now.terms.close_at is not None and now.admitted >= now.terms.close_at
    return enough or now.admitted + now.lost + now.gone >= now.asked


def _hopeless(now: Round, event: Event) -> bool:
    """Nothing is to come any more, of no round; who is gone may be back before the deadline."""
    return now.admitted + now.lost >= now.asked and not now.owed


def _overdue(now: Round, event: Event) -> bool:
    return isinstance(event, Tick) and now.paused_s is None and event.at_s >= now.ends_s


def _both(one: Guard, other: Guard) -> Guard:
    return lambda now, event: one(now, event) and other(now, event)


@dataclass(frozen=True)
class Row:
    """From a state, on an event, if the guard holds, to a state."""

    state: State
    event: type[Event]
    guard: Guard
    to: State


TABLE = (
    Row(State.PLANNED, Asked, _both(_complete, _quorate), State.MERGING),
    Row(State.PLANNED, Asked, _hopeless, State.ABANDONED),
    Row(State.PLANNED, Asked, _always, State.COLLECTING),
    Row(State.PLANNED, Abort, _always, State.ABANDONED),
    Row(State.COLLECTING, Admitted, _both(_complete, _quorate), State.MERGING),
    Row(State.COLLECTING, Admitted, _hopeless, State.ABANDONED),
    Row(State.COLLECTING, Admitted, _always, State.COLLECTING),
    Row(State.COLLECTING, Lost, _both(_complete, _quorate), State.MERGING),
    Row(State.COLLECTING, Lost, _hopeless, State.ABANDONED),
    Row(State.COLLECTING, Lost, _always, State.COLLECTING),
    Row(State.COLLECTING, Gone, _both(_complete, _quorate), State.MERGING),
    Row(State.COLLECTING, Gone, _always, State.COLLECTING),
    Row(State.COLLECTING, Back, _always, State.COLLECTING),
    Row(State.COLLECTING, Tick, _both(_overdue, _quorate), State.MERGING),
    Row(State.COLLECTING, Tick, _overdue, State.ABANDONED),
    Row(State.COLLECTING, Tick, _always, State.COLLECTING),
    Row(State.COLLECTING, Pause, _always, State.COLLECTING),
    Row(State.COLLECTING, Resume, _always, State.COLLECTING),
    Row(State.COLLECTING, Drain, _quorate, State.MERGING),
    Row(State.COLLECTING, Drain, _always, State.ABANDONED),
    Row(State.COLLECTING, Abort, _always, State.ABANDONED),
    Row(State.MERGING, Merged, _always, State.GATING),
    Row(State.MERGING, Failed, _always, State.ABANDONED),
    Row(State.GATING, Passed, _always, State.PUBLISHED),
    Row(State.GATING, Rejected, _always, State.ABANDONED),
)
"""Every transition. What is not here cannot happen, and is refused."""


def step(now: Round, event: Event) -> Round:
    """The round after an event.

    Raises:
        NotAllowedError: The event cannot happen in its state.
    """
    counted = _counted(now, event)
    for row in TABLE:
        if row.state == now.state and isinstance(event, row.event) and row.guard(counted, event):
            reason = _why(counted, event) if row.to is State.ABANDONED else ""
            return replace(counted, state=row.to, reason=reason)
    raise NotAllowedError(f"round {now.number} is {now.state}: it cannot be {_name(event)} there")


def _counted(now: Round, event: Event) -> Round:
    """The round with what the event tells, in the state it was in."""
    terms = now.terms
    match event:
        case Asked():
            return replace(
                now,
                asked=event.waiting + event.admitted,
                admitted=event.admitted,
                owed=event.owed,
                began_s=event.at_s,
                ends_s=event.at_s + terms.deadline_s,
            )
        case Admitted():
            moved = min(event.at_s + terms.progress_s, now.began_s + terms.cap_s)
            found = event.beside and now.lost > 0
            # A late one leaves as many of the round's own to come as before.
            return replace(
                now,
                asked=now.asked + event.late + (event.beside and not found) - event.replaces,
                admitted=now.admitted + 1 - event.replaces,
                lost=now.lost - found,
                owed=max(0, now.owed - event.late),
                ends_s=max(now.ends_s, moved),
            )
        case Lost(late=True):
            return replace(now, owed=max(0, now.owed - 1))
        case Lost():
            return replace(now, lost=now.lost + 1)
        case Gone():
            return replace(now, gone=now.gone + 1)
        case Back():
            return replace(now, gone=max(0, now.gone - 1))
        case Pause() if now.paused_s is None:
            return replace(now, paused_s=event.at_s)
        case Resume() if now.paused_s is not None:
            stood = event.at_s - now.paused_s
            return replace(
                now, paused_s=None, began_s=now.began_s + stood, ends_s=now.ends_s + stood
            )
        case _:
            return now


def _why(now: Round, event: Event) -> str:
    """Why an event ends a round without a publication."""
    if isinstance(event, Abort | Failed | Rejected):
        return event.reason
    return f"{now.admitted} admitted, the quorum is {now.needed}"


def _name(event: Event) -> str:
    return type(event).__name__.lower()

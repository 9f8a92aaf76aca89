from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.coordinator.rounds.machine import (
    OVER,
    TABLE,
    Abort,
    Admitted,
    Asked,
    Back,
    Drain,
    Event,
    Failed,
    Gone,
    Lost,
    Merged,
    NotAllowedError,
    Passed,
    Pause,
    Rejected,
    Resume,
    Round,
    State,
    Terms,
    Tick,
    step,
)

TERMS = Terms(quorum=2, deadline_s=10)


def after(*events: Event, terms: Terms = TERMS) -> Round:
    now = Round(1, terms)
    for event in events:
        now = step(now, event)
    return now


def test_a_round_goes_from_plan_to_publication() -> None:
    events = [Asked(0, 3), Admitted(1), Lost(), Admitted(2), Merged(), Passed()]
    states = [after(*events[:count]).state.value for count in range(len(events) + 1)]
    assert states == [
        "planned", "collecting", "collecting", "collecting", "merging", "gating", "published",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "events", "state", "reason"),
    [
        (TERMS, [Asked(0, 2), Admitted(1), Lost()], "abandoned", "1 admitted, the quorum is 2"),
        # A quorum does not wait for who is gone; a round without one does, to its deadline.
        (TERMS, [Asked(0, 3), Admitted(1), Gone(), Admitted(2)], "merging", ""),
        (TERMS, [Asked(0, 3), Admitted(1), Admitted(2), Gone()], "merging", ""),
        (TERMS, [Asked(0, 3), Admitted(1), Gone(), Back(), Admitted(2)], "collecting", ""),
        (TERMS, [Asked(0, 2), Admitted(1), Gone()], "collecting", ""),
        (TERMS, [Asked(0, 2), Admitted(1), Gone(), Back(), Admitted(2)], "merging", ""),
        (TERMS, [Asked(0, 2), Admitted(1), Gone(), Tick(10)], "abandoned",
         "1 admitted, the quorum is 2"),
        (TERMS, [Asked(0, 3), Admitted(1), Admitted(2), Tick(9.9)], "collecting", ""),
        (TERMS, [Asked(0, 3), Admitted(1), Admitted(2), Tick(10)], "merging", ""),
        (TERMS, [Asked(0, 3), Admitted(1), Tick(10)], "abandoned", "1 admitted, the quorum is 2"),
        # Restarted: two are held, and two more have all been asked for.
        (TERMS, [Asked(0, 0, 2)], "merging", ""),
        (TERMS, [Asked(0, 0, 1)], "abandoned", "1 admitted, the quorum is 2"),
        (TERMS, [Asked(0, 1, 1), Admitted(1)], "merging", ""),
        # A share of those asked, rounded up.
        (replace(TERMS, quorum_fraction=0.6), [Asked(0, 4), Admitted(1), Admitted(1), Tick(10)],
         "abandoned", "2 admitted, the quorum is 3"),
        # Closed at so many, whatever is still on its way.
        (replace(TERMS, close_at=2), [Asked(0, 9), Admitted(1), Admitted(1)], "merging", ""),
        # Late ones count, and leave as many to wait for.
        (TERMS, [Asked(0, 2), Admitted(1, late=True), Admitted(1)], "collecting", ""),
        (TERMS, [Asked(0, 2), Admitted(1, late=True), Admitted(1), Lost()], "merging", ""),
        # Whoever is still at work for an earlier round may yet make the quorum.
        (TERMS, [Asked(0, 0, 0, owed=2)], "collecting", ""),
        (TERMS, [Asked(0, 0, 0, owed=2), Admitted(1, late=True), Admitted(1, late=True)],
         "merging", ""),
        (TERMS, [Asked(0, 1, 0, owed=1), Admitted(1), Lost(late=True)],
         "abandoned", "1 admitted, the quorum is 2"),
        (TERMS, [Asked(0, 1, 0, owed=1), Lost(), Tick(10)],
         "abandoned", "0 admitted, the quorum is 2"),
        # A client's own update takes the place of its carried one: one vote each.
        (replace(TERMS, close_at=2), [Asked(0, 3, 1), Admitted(1, replaces=True)],
         "collecting", ""),
        (TERMS, [Asked(0, 1, 2), Admitted(1, replaces=True)], "merging", ""),
        # Closed at fewer than the quorum's share: it waits for that.
        (replace(TERMS, close_at=2, quorum_fraction=0.75), [Asked(0, 4), Admitted(1), Admitted(1)],
         "collecting", ""),
        (TERMS, [Asked(0, 3), Admitted(1), Admitted(1), Drain()], "merging", ""),
        (TERMS, [Asked(0, 3), Admitted(1), Drain()], "abandoned", "1 admitted, the quorum is 2"),
        (TERMS, [Asked(0, 3), Abort("by hand")], "abandoned", "by hand"),
        (TERMS, [Asked(0, 0, 2), Failed("odd")], "abandoned", "odd"),
        (TERMS, [Asked(0, 0, 2), Merged(), Rejected("worse")], "abandoned", "worse"),
    ],
)  # fmt: skip
def test_how_a_round_closes(terms: Terms, events: list[Event], state: str, reason: str) -> None:
    now = after(*events, terms=terms)
    assert (now.state.value, now.reason) == (state, reason)


def test_progress_moves_the_deadline_up_to_the_cap() -> None:
    terms = Terms(quorum=1, deadline_s=10, progress_s=6, cap_s=15)
    now = after(Asked(100, 9), terms=terms)
    ends = []
    for at_s in (101, 108, 109.5, 113):
        now = step(now, Admitted(at_s))
        ends.append(now.ends_s)
    assert ends == [110, 114, 115, 115]


def test_a_pause_stops_the_clock_and_not_the_updates() -> None:
    now = after(Asked(0, 3), Pause(4), Admitted(5), Tick(1000), Pause(7), Admitted(8))
    assert (now.state, now.admitted, now.ends_s) == (State.COLLECTING, 2, 10)
    now = step(now, Resume(24))
    assert (now.began_s, now.ends_s) == (20, 30)
    assert step(now, Tick(29)).state is State.COLLECTING
    assert step(now, Tick(30)).state is State.MERGING
    # Resumed once more: nothing stood still.
    assert step(now, Resume(26)).ends_s == 30


EVENTS: tuple[Event, ...] = (
    Asked(0, 2), Admitted(1), Lost(), Gone(), Back(), Tick(1), Pause(1), Resume(1), Drain(),
    Abort("x"),
    Merged(), Failed("x"), Passed(), Rejected("x"),
)  # fmt: skip


def test_what_the_table_does_not_name_is_refused() -> None:
    for state, event in product(State, EVENTS):
        named = any(row.state is state and isinstance(event, row.event) for row in TABLE)
        now = replace(Round(7, TERMS), state=state, asked=5)
        if named:
            step(now, event)
            continue
        with pytest.raises(NotAllowedError, match=f"round 7 is {state.value}"):
            step(now, event)
    assert not any(row.state in OVER for row in TABLE)


def test_every_state_is_reached_and_left() -> None:
    assert {row.to for row in TABLE} == set(State) - {State.PLANNED}
    assert {row.state for row in TABLE} == set(State) - set(OVER)


@given(
    st.integers(0, 6), st.integers(0, 3), st.integers(0, 2), st.integers(1, 4),
    st.lists(
        st.sampled_from(
            ["admit", "late", "lose", "lose late", "gone", "back", "tick", "pause", "resume"]
        ),
        max_size=20,
    ),
)  # fmt: skip
def test_a_round_never_merges_below_its_quorum_and_never_hangs(
    waiting: int, held: int, owed: int, quorum: int, what: list[str]
) -> None:
    now, answered, at_s = after(Asked(0, waiting, held, owed), terms=Terms(quorum, 10)), 0, 0.0
    admitted, gone = held, 0
    for word in what:
        if now.state is not State.COLLECTING:
            break
        at_s += 1
        if word in ("admit", "lose", "gone") and answered == waiting:
            continue
        if word == "back" and not gone:
            continue
        gone += (word == "gone") - (word == "back")
        answered += (word in ("admit", "lose", "gone")) - (word == "back")
        owed -= word in ("late", "lose late")
        admitted += word in ("admit", "late")
        made: dict[str, Event] = {
            "admit": Admitted(at_s), "late": Admitted(at_s, late=True), "lose": Lost(),
            "lose late": Lost(late=True), "gone": Gone(), "back": Back(),
            "tick": Tick(at_s), "pause": Pause(at_s), "resume": Resume(at_s),
        }  # fmt: skip
        now = step(now, made[word])
    assert now.admitted == admitted
    if now.state is State.COLLECTING:
        assert answered < waiting or owed > 0 or gone
        if now.paused_s is not None:
            now = step(now, Resume(at_s))
        now = step(now, Tick(math.inf))
    assert now.state is (State.MERGING if admitted >= quorum else State.ABANDONED)

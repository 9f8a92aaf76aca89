"""The sum is the plain sum whoever drops out, and nothing opens below the threshold."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.wire.secure.conftest import KEYS, NAMES, RING, SESSION, Group, other_session, refused

from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.session import SecureSession, threshold_of

PHASES = ("advertise", "deal", "mask", "confirm", "open")


@pytest.mark.parametrize("bits", [32, 64])
def test_the_sum_is_the_plain_sum(bits: int) -> None:
    group = Group(other_session(bits=bits))
    group.open(group.until_confirmed())
    total, names = group.recovery.total()
    assert names == NAMES
    assert (total == group.plain_sum(NAMES)).all()
    exact = sum(np.clip(vector, -2, 2) for vector in group.vectors.values())
    assert np.abs(total - exact).max() <= len(NAMES) * float(group.session.fixed.step) / 2 + 1e-14


@pytest.mark.parametrize("members", [4, 5])
def test_whoever_drops_out_costs_only_itself(members: int) -> None:
    """Every way in which one of four can vanish, and two of five, three being the threshold."""
    names = NAMES[:members]
    session = other_session(members=members, threshold=3, entries=37)
    for count in range(members - 2):
        for who in combinations(names, count):
            if members == 5 and who not in {(), names[1::2]}:
                continue
            for when in product(PHASES, repeat=count):
                pattern = dict(zip(who, when, strict=True))
                total, found, plain = _sum_without(pattern, session, names)
                stayed = [name for name in names if pattern.get(name) not in PHASES[:3]]
                assert list(found) == stayed, pattern
                assert (total == plain).all(), pattern


def _sum_without(
    pattern: Mapping[str, str], session: SecureSession, names: tuple[str, ...]
) -> tuple[NDArray[np.float64], tuple[str, ...], NDArray[np.float64]]:
    """The protocol's sum and whose it is, and theirs without it, where some vanish in a phase."""
    group = Group(session, names)

    def left(phase: str) -> list[str]:
        gone = PHASES[: PHASES.index(phase) + 1]
        return [name for name in names if pattern.get(name) not in gone]

    group.deal(group.advertise(left("advertise")), left("deal"))
    survivors = group.mask(left("mask"))
    group.open(group.confirm(survivors, left("confirm")), left("open"))
    total, found = group.recovery.total()
    return total, found, group.plain_sum(found)


@pytest.mark.parametrize("phase", PHASES)
def test_below_the_threshold_nothing_opens(phase: str) -> None:
    few = NAMES[:3]
    group = Group()
    if phase == "advertise":
        assert refused(lambda: group.advertise(few)) == "threshold"
        return
    roster = group.advertise()
    group.deal(roster, few if phase == "deal" else None)
    if phase == "deal":
        assert refused(lambda: group.recovery.delivery(NAMES[0])) == "threshold"
        return
    if phase == "mask":
        assert refused(lambda: group.mask(few)) == "threshold"
        return
    survivors = group.mask()
    if phase == "confirm":
        assert refused(lambda: group.confirm(survivors, few)) == "threshold"
        return
    group.open(group.confirm(survivors), few)
    assert refused(group.recovery.total) == "threshold"


def test_a_member_is_the_same_after_it_was_kept_between_phases() -> None:
    group = Group()

    def kept() -> None:
        for name in NAMES:
            state = group.members[name].to_bytes()
            group.members[name] = SecureMember.from_bytes(state, SESSION, KEYS[name], RING)

    roster = group.advertise()
    kept()
    group.deal(roster)
    kept()
    survivors = group.mask()
    kept()
    confirmations = group.confirm(survivors)
    kept()
    group.open(confirmations)
    assert (group.recovery.total()[0] == group.plain_sum(NAMES)).all()
    state = group.members[NAMES[0]].to_bytes()
    # The secrets are gone once they were used.
    assert len(state) < 5000
    other = other_session(round=4)
    assert refused(lambda: SecureMember.from_bytes(state, other, KEYS[NAMES[0]], RING)) == "phase"
    assert refused(lambda: SecureMember.from_bytes(state, SESSION, KEYS[NAMES[1]], RING)) == "phase"


def test_a_masked_vector_says_nothing_by_itself() -> None:
    group = Group(other_session(entries=20_000))
    group.deal(group.advertise())
    plain = group.encoded(NAMES[0])
    blob = group.masked(NAMES[0])
    words = np.frombuffer(blob[-4 * 20_000 - 200 : -200][: 4 * 20_000], np.uint32)
    # Bits of uniform words are one half of the time set, whatever they cover.
    share = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(share - 0.5) < 0.005
    assert np.unpackbits(plain.view(np.uint8)).mean() != pytest.approx(0.5, abs=0.001)


def test_thresholds_are_more_than_the_share() -> None:
    assert [threshold_of(n, 2 / 3) for n in (2, 3, 4, 5, 6, 9, 10, 100)] == [
        2, 3, 3, 4, 5, 7, 7, 67,
    ]  # fmt: skip
    assert [threshold_of(n, 0.5) for n in (2, 3, 4, 5, 100)] == [2, 2, 3, 3, 51]
    for n in range(2, 200):
        assert n < 2 * threshold_of(n, 0.5) <= 2 * n


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"members": 1, "threshold": 1}, "a group of 1"),
        ({"members": 1001, "threshold": 600}, "a group of 1001"),
        ({"threshold": 3}, "a threshold of 3"),
        ({"threshold": 7}, "a threshold of 7"),
        ({"entries": 0}, "0 entries"),
        ({"clip": -1.0}, "clip is -1.0"),
    ],
)
def test_a_session_that_protects_nobody_is_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        other_session(**changes)


def test_every_field_of_a_session_is_in_its_name() -> None:
    changes: dict[str, object] = {
        "federation": "g", "run": "s", "round": 4, "group": 1, "plan_hash": "cd" * 32,
        "members": 7, "threshold": 5, "entries": 1002, "clip": 2.5, "bits": 64,
    }  # fmt: skip
    assert set(changes) == set(SecureSession.__dataclass_fields__)
    digests = {other_session(**{name: value}).digest for name, value in changes.items()}
    assert len(digests | {SESSION.digest}) == len(changes) + 1

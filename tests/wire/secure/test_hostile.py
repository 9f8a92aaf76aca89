"""Bytes from members that lie: the coordinator refuses them, and the others go on."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.wire.secure.conftest import KEYS, NAMES, RING, SESSION, Group, refused

from anabranch.wire import WireError
from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.messages import most_bytes, sign
from anabranch.wire.secure.shamir import SHARE_BYTES
from anabranch.wire.v1 import secure_pb2 as pb

LIAR = NAMES[1]


def resigned(phase: str, blob: bytes, kind: type, change: Callable[[object], object]) -> bytes:
    """A message changed by the very member that signs it."""
    body = kind.FromString(pb.Signed.FromString(blob).body)
    change(body)
    return sign(phase, body, KEYS[LIAR])  # type: ignore[arg-type]


def field(name: str, value: object) -> Callable[[object], object]:
    return lambda body: setattr(body, name, value)


def test_dishonest_advertisements_are_refused() -> None:
    group = Group()
    honest = group.members[LIAR].advertise()
    other = group.members[NAMES[0]].advertise()
    group.recovery.take_advertisement(NAMES[0], other)
    theirs = pb.Advertisement.FromString(pb.Signed.FromString(other).body)
    for change, code in (
        (field("client", NAMES[2]), "meta"),
        (field("client", "no name"), "meta"),
        (field("session", bytes(32)), "phase"),
        (field("share_key", b"short"), "values"),
        (field("seed_digest", bytes(33)), "values"),
        (field("mask_key", bytes(32)), "payload"),  # of low order: its secret is zero for all
        (field("mask_key", theirs.mask_key), "values"),
        (field("share_key", theirs.mask_key), "values"),
    ):
        blob = resigned("advertise", honest, pb.Advertisement, change)
        assert refused(lambda b=blob: group.recovery.take_advertisement(LIAR, b)) == code
    take = group.recovery.take_advertisement
    assert refused(lambda: take(LIAR, other)) == "meta"
    assert refused(lambda: take(LIAR, honest + bytes(100_000))) == "too-large"
    assert refused(lambda: take(LIAR, b"")) == "meta"
    take(LIAR, honest)
    assert refused(lambda: take(LIAR, honest)) == "phase"
    group.advertise(NAMES[2:])
    assert refused(lambda: take(LIAR, honest)) == "phase"


def test_dishonest_dealings_are_refused() -> None:
    group = Group()
    roster = group.advertise()
    honest = group.members[LIAR].deal(roster)
    for change, code in (
        (field("roster", bytes(32)), "phase"),
        (lambda body: body.sealed.pop(), "counts"),
        (lambda body: body.sealed.append(b""), "counts"),
        (lambda body: body.digests.__setitem__(0, b"x"), "counts"),
        (lambda body: body.sealed.__setitem__(0, b""), "counts"),
    ):
        blob = resigned("deal", honest, pb.Dealing, change)
        assert refused(lambda b=blob: group.recovery.take_dealing(LIAR, b)) == code
    group.recovery.take_dealing(LIAR, honest)
    assert refused(lambda: group.recovery.take_dealing(LIAR, honest)) == "phase"


def test_shares_that_do_not_open_cost_their_dealer_alone() -> None:
    """A liar seals nonsense for everybody: the others mask with it, and it drops out."""
    group = Group()
    roster = group.advertise()
    group.deal(roster, [name for name in NAMES if name != LIAR])
    nonsense = resigned(
        "deal",
        group.members[LIAR].deal(roster),
        pb.Dealing,
        lambda body: [
            body.sealed.__setitem__(n, bytes(len(part))) for n, part in enumerate(body.sealed)
        ],
    )
    group.recovery.take_dealing(LIAR, nonsense)
    survivors = group.mask()
    group.open(group.confirm(survivors))
    # It stayed to the end, so that its own share of its seed is the only one.
    with pytest.raises(WireError, match="1 shares, and 4 are needed"):
        group.recovery.total()


def test_a_dealer_of_another_secret_is_named() -> None:
    group = Group()
    roster = group.advertise()
    group.members[LIAR]._seed = bytes(32)
    group.deal(roster)
    group.open(group.confirm(group.mask()))
    with pytest.raises(WireError, match=f"{LIAR} dealt shares of another secret"):
        group.recovery.total()


def test_dishonest_vectors_are_refused() -> None:
    group = Group()
    group.deal(group.advertise())
    honest = group.masked(LIAR)
    take = group.recovery.take_masked
    for change, code in (
        (lambda body: setattr(body, "vector", body.vector[:-1]), "layout"),
        (lambda body: setattr(body, "vector", b""), "layout"),
        (lambda body: body.dealers.pop(), "layout"),
        (field("roster", b""), "phase"),
    ):
        blob = resigned("mask", honest, pb.Masked, change)
        assert refused(lambda b=blob: take(LIAR, b)) == code
    assert refused(lambda: take(NAMES[2], honest)) == "meta"
    take(LIAR, honest)
    assert refused(lambda: take(LIAR, honest)) == "phase"
    group.mask([name for name in NAMES if name != LIAR])


def test_dishonest_confirmations_and_openings_are_refused() -> None:
    group = Group()
    survivors = group.until_masked()
    honest = group.members[LIAR].confirm(survivors)
    take = group.recovery.take_confirmation
    for change, code in (
        (lambda body: body.survivors.pop(), "equivocation"),
        (field("roster", bytes(32)), "phase"),
        (field("session", b""), "phase"),
    ):
        blob = resigned("confirm", honest, pb.Confirmation, change)
        assert refused(lambda b=blob: take(LIAR, b)) == code
    take(LIAR, honest)
    assert refused(lambda: take(LIAR, honest)) == "phase"
    rest = [name for name in NAMES if name != LIAR]
    confirmations = group.confirm(survivors, rest)
    opening = group.members[LIAR].open(confirmations)
    for change, code in (
        (lambda body: body.shares.__setitem__(0, bytes(SHARE_BYTES)), "share"),
        (lambda body: body.shares.pop(), "counts"),
        (lambda body: body.owners.__setitem__(5, 6), "counts"),
    ):
        blob = resigned("open", opening, pb.Opening, change)
        assert refused(lambda b=blob: group.recovery.take_opening(LIAR, b)) == code
    # Nothing of what was refused counts, and the others are enough.
    group.open(confirmations, rest)
    assert (group.recovery.total()[0] == group.plain_sum(NAMES)).all()


@pytest.mark.parametrize("phase", ["advertise", "deal", "mask", "confirm", "open"])
def test_cut_and_flipped_messages_never_raise_anything_else(phase: str) -> None:
    group = Group()
    recovery, draw = group.recovery, random.Random(phase)
    takes = {
        "advertise": recovery.take_advertisement,
        "deal": recovery.take_dealing,
        "mask": recovery.take_masked,
        "confirm": recovery.take_confirmation,
        "open": recovery.take_opening,
    }
    steps = {
        "advertise": lambda: group.members[LIAR].advertise(),
        "deal": lambda: group.members[LIAR].deal(group.advertise()),
        "mask": lambda: (group.deal(group.advertise()), group.masked(LIAR))[1],
        "confirm": lambda: group.members[LIAR].confirm(group.until_masked()),
        "open": lambda: group.members[LIAR].open(group.until_confirmed()),
    }
    honest = steps[phase]()
    for _ in range(60):
        blob = bytearray(honest)
        if draw.random() < 0.3:
            del blob[draw.randrange(len(blob)) :]
        else:
            blob[draw.randrange(len(blob))] ^= 1 << draw.randrange(8)
        refused(lambda b=bytes(blob): takes[phase](LIAR, b))
    takes[phase](LIAR, honest)


@pytest.fixture(scope="module")
def waiting() -> dict[str, bytes]:
    """One member as it waits for each of the coordinator's messages."""
    group, first = Group(), NAMES[0]
    states = {}
    roster = group.advertise()
    states["deal"] = group.members[first].to_bytes()
    group.deal(roster)
    states["mask"] = group.members[first].to_bytes()
    survivors = group.mask()
    states["confirm"] = group.members[first].to_bytes()
    group.confirm(survivors)
    states["open"] = group.members[first].to_bytes()
    return states


@given(data=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_refused_by_a_member(waiting: dict[str, bytes], data: bytes) -> None:
    for phase, state in waiting.items():
        member = SecureMember.from_bytes(state, SESSION, KEYS[NAMES[0]], RING)
        call = getattr(member, phase)
        vector = [np.zeros(SESSION.entries, np.uint32)] if phase == "mask" else []
        assert refused(lambda c=call, v=vector: c(data, *v)) != "phase"


def test_bounds_follow_the_session() -> None:
    assert most_bytes(SESSION, "open") < 2000 + 200 * SESSION.members
    assert most_bytes(SESSION, "mask") - most_bytes(SESSION, "open") == 4 * SESSION.entries
    # An honest message of each phase keeps them, with the longest names there are.
    name = "n" * 100
    member = SecureMember(SESSION, KEYS[NAMES[0]], RING)
    body = pb.Masked(
        session=bytes(32), roster=bytes(32), client=name, dealers=range(6), vector=bytes(4004)
    )
    assert len(sign("mask", body, member.key)) <= most_bytes(SESSION, "mask")

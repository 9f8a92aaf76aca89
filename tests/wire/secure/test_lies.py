"""A coordinator that lies: what each member refuses, and why its vector stays hidden."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from tests.wire.secure.conftest import KEYS, NAMES, RING, SESSION, Group, other_session, refused

from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.secure import agreement
from anabranch.wire.secure.masks import add_mask, take_mask
from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.messages import sign, write_roster
from anabranch.wire.secure.shamir import SHARE_BYTES, combine
from anabranch.wire.signing import KeyRing
from anabranch.wire.v1 import secure_pb2 as pb

VICTIM = 2


def survivors(*numbers: int) -> bytes:
    return pb.Survivors(members=numbers).SerializeToString()


def confirmations(*signed: bytes) -> bytes:
    return pb.Confirmations(signed=signed).SerializeToString()


def test_with_both_secrets_a_vector_would_be_open() -> None:
    """What all of the rest is about: the seed and the mask key of one member give its vector."""
    group = Group()
    roster = group.advertise()
    group.deal(roster)
    group.recovery.delivery(NAMES[0])
    blobs = {name: group.masked(name) for name in NAMES}
    held = [group.members[name]._held[VICTIM] for name in NAMES[: SESSION.threshold]]
    halves = [
        combine({n + 1: share[part] for n, share in enumerate(held)}, SESSION.threshold)
        for part in (slice(SHARE_BYTES), slice(SHARE_BYTES, None))
    ]
    body = pb.Masked.FromString(pb.Signed.FromString(blobs[NAMES[VICTIM]]).body)
    vector = np.frombuffer(body.vector, "<u4").copy()
    take_mask(vector, halves[1])
    found = group.recovery.roster()
    for other in range(len(NAMES)):
        if other != VICTIM:
            pair = (min(other, VICTIM), max(other, VICTIM))
            bound = SESSION.digest + found.digest
            public = found.members[other].mask_key
            undo = add_mask if other < VICTIM else take_mask
            undo(vector, agreement.pair_seed(halves[0], public, bound, pair))
    assert (vector == group.encoded(NAMES[VICTIM])).all()


def test_a_second_list_of_survivors_is_not_signed() -> None:
    group = Group()
    everybody = group.until_masked()
    member = group.members[NAMES[0]]
    member.confirm(everybody)
    assert refused(lambda: member.confirm(survivors(0, 1, 3, 4, 5))) == "phase"
    assert refused(lambda: member.confirm(everybody)) == "phase"


def test_two_lists_of_survivors_open_nothing() -> None:
    """Half of the group is told that the victim dropped out: neither half reaches the threshold."""
    group = Group()
    group.until_masked()
    told = {name: survivors(0, 1, 2, 3, 4, 5) for name in NAMES[:3]}
    told |= {name: survivors(0, 1, 3, 4, 5) for name in NAMES[3:]}
    signed = {name: group.members[name].confirm(told[name]) for name in NAMES}
    halves = [[signed[name] for name in part] for part in (NAMES[:3], NAMES[3:])]
    for name, half in ((NAMES[0], halves[0]), (NAMES[5], halves[1])):
        state = group.members[name].to_bytes()
        for shown, code in (
            (half, "threshold"),
            ([*halves[0], *halves[1]], "equivocation"),
            ([half[0]] * 6, "threshold"),
        ):
            member = SecureMember.from_bytes(state, SESSION, KEYS[name], RING)
            assert refused(lambda m=member, s=shown: m.open(confirmations(*s))) == code


def test_shares_come_once_and_one_of_each_member() -> None:
    group = Group()
    shown = group.until_confirmed()
    member = group.members[NAMES[0]]
    opening = pb.Opening.FromString(pb.Signed.FromString(member.open(shown)).body)
    assert list(opening.owners) == list(range(6))
    assert {len(share) for share in opening.shares} == {SHARE_BYTES}
    assert refused(lambda: member.open(shown)) == "phase"
    assert SESSION.digest in member.to_bytes()
    assert not member._held


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((0, 1, 2), "threshold"),
        ((1, 2, 3, 4, 5), "counts"),  # this member's own vector would be none of the sum
        ((0, 0, 1, 2, 3), "counts"),
        ((3, 2, 1, 0), "counts"),
        ((0, 1, 2, 3, 4, 6), "counts"),
        ((), "threshold"),
    ],
)
def test_lists_of_survivors_that_no_honest_round_has(numbers: tuple[int, ...], code: str) -> None:
    group = Group()
    group.until_masked()
    assert refused(lambda: group.members[NAMES[0]].confirm(survivors(*numbers))) == code


def test_a_survivor_that_did_not_deal_is_refused() -> None:
    group = Group()
    group.deal(group.advertise(), NAMES[:5])
    group.mask(NAMES[:5])
    assert refused(lambda: group.members[NAMES[0]].confirm(survivors(0, 1, 2, 3, 5))) == "counts"


def test_swapped_keys_are_refused() -> None:
    """The coordinator puts keys of its own in a member's place, whoever signs them."""
    group = Group()
    rows = [group.members[name].advertise() for name in NAMES]
    own = pb.Advertisement(
        session=SESSION.digest,
        client=NAMES[1],
        share_key=agreement.public_of(secrets.token_bytes(32)),
        mask_key=agreement.public_of(secrets.token_bytes(32)),
        seed_digest=bytes(32),
    )
    coordinator = seeded_key("coordinator", 9)
    impostor = seeded_key(NAMES[1], 9)
    original = pb.Signed.FromString(rows[1])
    swapped = {
        "unknown-key": sign("advertise", own, impostor),
        "wrong-key": sign("advertise", own, KEYS[NAMES[4]]),
        "bad-signature": pb.Signed(
            body=own.SerializeToString(), key_id=original.key_id, signature=original.signature
        ).SerializeToString(),
    }
    assert sign("advertise", own, coordinator) != swapped["unknown-key"]
    for code, row in swapped.items():
        member = SecureMember(SESSION, KEYS[NAMES[0]], RING)
        mine = member.advertise()
        roster = write_roster([mine, row, *rows[2:]])
        assert refused(lambda m=member, r=roster: m.deal(r)) == code


def test_a_stranger_is_no_member_though_the_coordinator_vouches_for_it() -> None:
    """Members know each other by lists of their own: the coordinator cannot fill a group."""
    stranger = seeded_key("site-z", 1)
    theirs = KeyRing(by_id([*RING.enrolled.values(), stranger.public]))
    made = SecureMember(SESSION, stranger, theirs).advertise()
    member = SecureMember(SESSION, KEYS[NAMES[0]], RING)
    rows = [member.advertise()]
    rows += [SecureMember(SESSION, KEYS[name], RING).advertise() for name in NAMES[1:4]]
    assert refused(lambda: member.deal(write_roster([*rows, made]))) == "unknown-key"


def test_keys_of_another_round_are_refused() -> None:
    before = Group(other_session(round=2))
    old = [before.members[name].advertise() for name in NAMES]
    member = SecureMember(SESSION, KEYS[NAMES[0]], RING)
    mine = member.advertise()
    assert refused(lambda: member.deal(write_roster([mine, *old[1:]]))) == "phase"
    # And confirmations of another round open nothing in this one.
    group = Group()
    group.until_confirmed()
    then = Group(other_session(round=2))
    shown = then.until_confirmed()
    assert refused(lambda: group.members[NAMES[0]].open(shown)) == "phase"


def test_a_roster_without_the_members_own_keys_is_refused() -> None:
    group = Group()
    rows = [group.members[name].advertise() for name in NAMES]
    again = SecureMember(SESSION, KEYS[NAMES[0]], RING).advertise()
    for changed in (rows[1:], [again, *rows[1:]]):
        member = Group().members[NAMES[0]]
        member.advertise()
        assert refused(lambda m=member, r=changed: m.deal(write_roster(r))) == "meta"


def test_a_roster_out_of_order_or_of_too_few_is_refused() -> None:
    rows = [Group().members[name].advertise() for name in NAMES]
    for changed, code in (
        (rows[::-1], "counts"),
        ([rows[0], *rows], "threshold"),
        ([rows[0], *rows[:5]], "counts"),
        (rows[:3], "threshold"),
    ):
        member = SecureMember(SESSION, KEYS[NAMES[0]], RING)
        member.advertise()
        assert refused(lambda m=member, r=changed: m.deal(write_roster(r))) == code


def test_members_that_were_shown_other_rosters_open_nothing_together() -> None:
    """Five see the victim's keys, it sees a roster of its own: no share of either side opens."""
    group = Group()
    group.advertise()
    rows = dict(group.recovery._advertisements)
    partial = write_roster([rows[name] for name in NAMES[:4]])
    full = group.recovery.roster().blob
    victim = group.members[NAMES[VICTIM]]
    dealt = {
        name: pb.Dealing.FromString(pb.Signed.FromString(group.members[name].deal(full)).body)
        for name in NAMES
        if name != NAMES[VICTIM]
    }
    victim.deal(partial)
    delivery = pb.Delivery(
        dealers=range(4),
        sealed=[dealt[name].sealed[VICTIM] if name in dealt else b"" for name in NAMES[:4]],
    ).SerializeToString()
    assert refused(lambda: victim.mask(delivery, group.encoded(NAMES[VICTIM]))) == "threshold"


def test_steps_cannot_be_skipped_or_taken_again() -> None:
    group = Group()
    member = group.members[NAMES[0]]
    assert refused(lambda: member.deal(b"")) == "phase"
    member.advertise()
    assert refused(member.advertise) == "phase"
    assert refused(lambda: member.confirm(b"")) == "phase"
    assert refused(lambda: member.open(b"")) == "phase"
    assert refused(lambda: member.mask(b"", group.encoded(NAMES[0]))) == "phase"
    # A step that failed is over: another try could be another lie.
    assert refused(lambda: member.deal(b"")) == "threshold"
    assert refused(lambda: member.deal(b"")) == "phase"


def test_a_delivery_that_hides_others_is_refused() -> None:
    group = Group()
    group.deal(group.advertise())
    honest = pb.Delivery.FromString(group.recovery.delivery(NAMES[0]))
    few = pb.Delivery(dealers=honest.dealers[:3], sealed=honest.sealed[:3])
    without = pb.Delivery(dealers=honest.dealers[1:], sealed=honest.sealed[1:])
    odd = pb.Delivery(dealers=honest.dealers, sealed=honest.sealed[:5])
    state = group.members[NAMES[0]].to_bytes()
    for message, code in ((few, "threshold"), (without, "counts"), (odd, "counts")):
        member = SecureMember.from_bytes(state, SESSION, KEYS[NAMES[0]], RING)
        blob, vector = message.SerializeToString(), group.encoded(NAMES[0])
        assert refused(lambda m=member, b=blob, v=vector: m.mask(b, v)) == code


def test_a_vector_of_another_kind_is_the_callers_mistake() -> None:
    group = Group()
    group.deal(group.advertise())
    delivery = group.recovery.delivery(NAMES[0])
    for vector in (np.zeros(1000, np.uint32), np.zeros(1001, np.uint64)):
        with pytest.raises(ValueError, match="the session's has 1001 entries of uint32"):
            group.members[NAMES[0]].mask(delivery, vector)

"""Doors of secure aggregation: what members say, signed as it stands, and what is handed to one.

The first byte says which phase; the rest is a body, or a message of the coordinator. A lying member
signs what it likes, so signatures are put right first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import numpy as np

from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.messages import Phase, sign_raw
from anabranch.wire.secure.recovery import Recovery
from anabranch.wire.secure.session import SecureSession
from anabranch.wire.signing import KeyRing
from anabranch.wire.v1 import secure_pb2 as pb

PHASES: tuple[Phase, ...] = ("advertise", "deal", "mask", "confirm", "open")
_NAMES = ("a", "b", "c")
_LIAR = "c"
_KEYS = {name: seeded_key(name, 1) for name in _NAMES}
_RING = KeyRing(by_id(key.public for key in _KEYS.values()))
_SESSION = SecureSession("f", "r", 1, 0, "ab" * 32, 3, 2, 4, 1.0, 32)


def said_by_a_member(data: bytes) -> None:
    """What the coordinator makes of a body that a member signed.

    Raises:
        WireError: It is refused.
    """
    number, body = (data[0] % len(PHASES), data[1:]) if data else (0, b"")
    phase = PHASES[number]
    recovery = copy.deepcopy(_session().before[phase])
    take = {
        "advertise": recovery.take_advertisement,
        "deal": recovery.take_dealing,
        "mask": recovery.take_masked,
        "confirm": recovery.take_confirmation,
        "open": recovery.take_opening,
    }[phase]
    take(_LIAR, sign_raw(phase, body, _KEYS[_LIAR]))
    if phase == "open":
        recovery.total()


def said_to_a_member(data: bytes) -> None:
    """What a member makes of what the coordinator hands on.

    Raises:
        WireError: It is refused.
    """
    number, said = (1 + data[0] % (len(PHASES) - 1), data[1:]) if data else (1, b"")
    phase = PHASES[number]
    member = SecureMember.from_bytes(_session().waiting[phase], _SESSION, _KEYS[_LIAR], _RING)
    if phase == "mask":
        member.mask(said, np.zeros(_SESSION.entries, np.uint32))
    else:
        {"deal": member.deal, "confirm": member.confirm, "open": member.open}[phase](said)


def seeds() -> tuple[list[bytes], list[bytes]]:
    """Sound inputs of both doors, one for each phase."""
    bodies = [bytes([n]) + _session().bodies[phase] for n, phase in enumerate(PHASES)]
    handed = [bytes([n]) + _session().handed[phase] for n, phase in enumerate(PHASES[1:])]
    return bodies, handed


@dataclass(frozen=True)
class _Rehearsed:
    """By phase: coordinator and member before it speaks, what it is handed, what it says."""

    before: dict[Phase, Recovery]
    waiting: dict[Phase, bytes]
    handed: dict[Phase, bytes]
    bodies: dict[Phase, bytes]


@cache
def _session() -> _Rehearsed:
    """A session of honest members, as it stands whenever the last of them is about to speak."""
    recovery = Recovery(_SESSION, _RING)
    members = {
        name: SecureMember(
            _SESSION, _KEYS[name], _RING, 0, bytes([n, 1]) * 16, bytes([n, 2]) * 16, bytes([n]) * 32
        )
        for n, name in enumerate(_NAMES)
    }
    before: dict[Phase, Recovery] = {}
    waiting: dict[Phase, bytes] = {}
    handed: dict[Phase, bytes] = {}
    bodies: dict[Phase, bytes] = {}

    def speak(phase: Phase, name: str) -> bytes:
        member = members[name]
        said = handed[phase]
        if phase == "mask":
            return member.mask(recovery.delivery(name), np.zeros(_SESSION.entries, np.uint32))
        if phase == "advertise":
            return member.advertise()
        return {"deal": member.deal, "confirm": member.confirm, "open": member.open}[phase](said)

    hands = {
        "advertise": lambda: b"",
        "deal": lambda: recovery.roster().blob,
        "mask": lambda: recovery.delivery(_LIAR),
        "confirm": recovery.survivors,
        "open": recovery.confirmations,
    }
    for phase in PHASES:
        handed[phase] = hands[phase]()
        take = {
            "advertise": recovery.take_advertisement,
            "deal": recovery.take_dealing,
            "mask": recovery.take_masked,
            "confirm": recovery.take_confirmation,
            "open": recovery.take_opening,
        }[phase]
        for name in _NAMES:
            if name == _LIAR:
                before[phase] = copy.deepcopy(recovery)
                waiting[phase] = members[name].to_bytes()
            said = speak(phase, name)
            if name == _LIAR:
                bodies[phase] = pb.Signed.FromString(said).body
            take(name, said)
    return _Rehearsed(before, waiting, handed, bodies)

"""A group of members and its coordinator, with nothing between them but bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from anabranch.wire import WireError
from anabranch.wire.keys import PrivateKey, by_id, seeded_key
from anabranch.wire.secure.member import SecureMember
from anabranch.wire.secure.recovery import Recovery
from anabranch.wire.secure.session import SecureSession
from anabranch.wire.signing import KeyRing

NAMES = tuple(f"site-{letter}" for letter in "abcdef")
KEYS: Mapping[str, PrivateKey] = {name: seeded_key(name, 1) for name in NAMES}
RING = KeyRing(by_id(key.public for key in KEYS.values()))
SESSION = SecureSession(
    federation="f",
    run="r",
    round=3,
    group=0,
    plan_hash="ab" * 32,
    members=len(NAMES),
    threshold=4,
    entries=1001,
    clip=2.0,
    bits=32,
)


@dataclass
class Group:
    """Members by name, their vectors [D], and the coordinator they answer to."""

    session: SecureSession = SESSION
    names: tuple[str, ...] = NAMES
    members: dict[str, SecureMember] = field(init=False)
    vectors: dict[str, NDArray[np.float64]] = field(init=False)
    recovery: Recovery = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(7)
        self.members = {name: SecureMember(self.session, KEYS[name], RING) for name in self.names}
        self.vectors = {name: draw.normal(size=self.session.entries) for name in self.names}
        self.recovery = Recovery(self.session, RING)

    def encoded(self, name: str) -> NDArray[np.unsignedinteger]:
        return self.session.fixed.encode(self.vectors[name])

    def plain_sum(self, names: Iterable[str]) -> NDArray[np.float64]:
        """What the survivors' vectors add up to, without any of the protocol."""
        total = sum(
            self.encoded(name).view(f"i{self.session.bits // 8}").astype(object) for name in names
        )
        return np.array([float(entry) * float(self.session.fixed.step) for entry in total])

    def advertise(self, names: Iterable[str] | None = None) -> bytes:
        for name in names or self.names:
            self.recovery.take_advertisement(name, self.members[name].advertise())
        return self.recovery.roster().blob

    def deal(self, roster: bytes, names: Iterable[str] | None = None) -> None:
        for name in names or self.names:
            self.recovery.take_dealing(name, self.members[name].deal(roster))

    def mask(self, names: Iterable[str] | None = None) -> bytes:
        for name in names or self.names:
            self.recovery.take_masked(name, self.masked(name))
        return self.recovery.survivors()

    def masked(self, name: str) -> bytes:
        return self.members[name].mask(self.recovery.delivery(name), self.encoded(name))

    def confirm(self, survivors: bytes, names: Iterable[str] | None = None) -> bytes:
        for name in names or self.names:
            self.recovery.take_confirmation(name, self.members[name].confirm(survivors))
        return self.recovery.confirmations()

    def open(self, confirmations: bytes, names: Iterable[str] | None = None) -> None:
        for name in names or self.names:
            self.recovery.take_opening(name, self.members[name].open(confirmations))

    def until_masked(self) -> bytes:
        self.deal(self.advertise())
        return self.mask()

    def until_confirmed(self) -> bytes:
        return self.confirm(self.until_masked())


def refused(call: Callable[[], object]) -> str:
    """The code with which something is refused."""
    with pytest.raises(WireError) as caught:
        call()
    return caught.value.code


def other_session(**changes: object) -> SecureSession:
    return dataclasses.replace(SESSION, **changes)  # type: ignore[arg-type]

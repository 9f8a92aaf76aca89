"""What the members of a group must agree on before they mask anything. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from anabranch.wire.plan import RoundPlan
from anabranch.wire.secure.fixed import FixedPoint

MOST_MEMBERS = 1000
"""Of a group: each pair of them agrees on a key and masks the whole vector."""
LEAST_THRESHOLD = 2


@dataclass(frozen=True)
class SecureSession:
    """One group's aggregation in one round.

    Attributes:
        federation: Name of the federation.
        run: Name of the run.
        round: Number of the round.
        group: Number of the group in it, from 0.
        plan_hash: sha256 of the round's plan as it was signed, in hexadecimal. Members that were
            told to train otherwise, or from elsewhere, are in no session together: a coordinator
            could make all vectors but one vanish.
        members: Clients asked: no more can be in the sum.
        threshold: Members without whom nothing is opened; more than half of those asked.
        entries: Length of a vector.
        clip: See ``FixedPoint``.
        bits: See ``FixedPoint``.

    Raises:
        ValueError: Numbers that protect nobody, or that no vector fits.
    """

    federation: str
    run: str
    round: int
    group: int
    plan_hash: str
    members: int
    threshold: int
    entries: int
    clip: float
    bits: Literal[32, 64]

    def __post_init__(self) -> None:
        if not LEAST_THRESHOLD <= self.members <= MOST_MEMBERS:
            raise ValueError(
                f"a group of {self.members} cannot hide anybody's vector; "
                f"take {LEAST_THRESHOLD} to {MOST_MEMBERS} members"
            )
        # Two lists of survivors, each signed by so many, would share a signer: nobody signs two.
        if not self.members < 2 * self.threshold <= 2 * self.members:
            raise ValueError(
                f"a threshold of {self.threshold} for a group of {self.members} must be more than "
                "half of it, and no more than it"
            )
        if self.entries < 1:
            raise ValueError(f"a vector has {self.entries} entries; give at least 1")
        _ = self.fixed

    @cached_property
    def fixed(self) -> FixedPoint:
        """How entries become integers."""
        return FixedPoint(self.clip, self.bits, self.members)

    @cached_property
    def digest(self) -> bytes:
        """Names the session in everything its members sign."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(b"anabranch.session/1\0" + text.encode()).digest()

    @property
    def vector_bytes(self) -> int:
        """Length of a masked vector on the wire."""
        return self.entries * self.bits // 8


def secure_session(plan: RoundPlan, text: str) -> SecureSession:
    """The session that a round's plan asks for.

    Args:
        plan: The plan.
        text: Its JSON text as it travels.

    Raises:
        ValueError: It asks for none, or for one that protects nobody.
    """
    if plan.secure is None:
        raise ValueError("the plan asks for no secure aggregation")
    return SecureSession(
        federation=plan.federation,
        run=plan.run,
        round=plan.round,
        plan_hash=hashlib.sha256(text.encode()).hexdigest(),
        **plan.secure.model_dump(),
    )


def threshold_of(members: int, share: float) -> int:
    """The fewest members that are more than a share of a group.

    With 2/3, as Bonawitz et al. ask for against a coordinator with accomplices, fewer than a third
    of the members can help it to nothing.
    """
    # 2/3 of 3 is 2, also where the product falls a bit short of it.
    return min(members, int(members * share + 1e-9) + 1)

"""What a signed federation asks of an update: an enrolled key, a fresh time, a nonce of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.registry import changed, client_keys, coordinator_key
from anabranch.coordinator.store import Store
from anabranch.wire.errors import WireError
from anabranch.wire.keys import PrivateKey
from anabranch.wire.manifest import Manifest, UpdateMeta
from anabranch.wire.plan import RoundPlan
from anabranch.wire.sealing import SealKey, new_seal_key
from anabranch.wire.signing import KeyRing, check_message

NONCE_BYTES = 16
"""Fewest bytes of a nonce: that many random ones do not come twice."""


@dataclass(frozen=True)
class Planned:
    """When a round was planned.

    Attributes:
        wall_s: In Unix seconds.
        apart_s: Seconds that the clock which may be set then stood before the one that may not.
    """

    wall_s: int
    apart_s: float


@dataclass
class Trust:
    """Keys and memory of one signed federation.

    Attributes:
        folder: The federation's; its lists of keys are looked at for every update, so that a
            revocation counts at once.
        key: The coordinator's own.
        skew_s: Seconds by which a client's clock may differ from this one's.
        sealed: Whether updates are sealed.
        rounds: By round, when it was planned, and the key its updates are sealed to; None where
            they are not.
        nonces: Those of every update that was admitted.
        wall: Reads Unix seconds, of a clock that somebody may set.
        steady: Reads seconds of one that nobody sets.
    """

    folder: Path
    key: PrivateKey
    skew_s: float
    sealed: bool = False
    rounds: dict[int, tuple[Planned, SealKey | None]] = field(default_factory=dict)
    nonces: set[str] = field(default_factory=set)
    wall: Callable[[], float] = time.time
    steady: Callable[[], float] = time.monotonic
    _ring: KeyRing = field(default_factory=lambda: KeyRing({}), init=False)
    _stamp: tuple[tuple[int, int], ...] = field(default=(), init=False)

    def begin_round(self, plan: RoundPlan, planned_s: int | None = None) -> RoundPlan:
        """Note the time; where updates are sealed, the plan gets a fresh key to seal them to.

        Args:
            plan: The round's.
            planned_s: When it was planned, in Unix seconds; None: now.
        """
        seal = new_seal_key() if self.sealed else None
        at_s = int(self.wall()) if planned_s is None else planned_s
        self.rounds[plan.round] = Planned(at_s, self.wall() - self.steady()), seal
        return plan if seal is None else plan.model_copy(update={"seal_to": seal.public.hex()})

    def seal(self, number: int) -> SealKey | None:
        """The key that updates of a round are sealed to."""
        return self.rounds[number][1]

    def ring(self) -> KeyRing:
        """The clients' keys, as the lists say now."""
        stamp = changed(self.folder)
        if stamp != self._stamp:
            self._ring, self._stamp = client_keys(self.folder), stamp
        return self._ring

    def signed_by(self, manifest: Manifest, client: str) -> None:
        """Check who signed an update.

        Raises:
            WireError: Not an enrolled key of this client.
        """
        check_message(manifest, self.ring(), client)

    def fresh(self, meta: UpdateMeta) -> None:
        """Check that an update was made for its round, which was planned here, and not seen before.

        Raises:
            WireError: ``nonce``, ``replay``, ``expired`` or ``future``.
        """
        if len(meta.nonce) < NONCE_BYTES:
            raise WireError("nonce", f"the nonce has {len(meta.nonce)} bytes, not {NONCE_BYTES}")
        if meta.nonce.hex() in self.nonces:
            raise WireError("replay", "an update with this nonce was admitted before")
        # A clock that jumped while the round collects, here or at all nodes, costs nobody's update:
        # what either reading allows is allowed.
        planned, _ = self.rounds[meta.round]
        now_s, jumped_s = self.wall(), self._jumped_s(planned)
        early_s = planned.wall_s + min(0.0, jumped_s) - meta.issued_s
        if early_s > self.skew_s:
            raise WireError("expired", f"it was made {early_s:.0f} s before its round was planned")
        late_s = meta.issued_s - max(now_s, now_s - jumped_s)
        if late_s > self.skew_s:
            raise WireError("future", f"it was made {late_s:.0f} s from now; set the node's clock")

    def _jumped_s(self, planned: Planned) -> float:
        """Seconds by which the clock was set since a round was planned."""
        return self.wall() - self.steady() - planned.apart_s


def trust_of(folder: Path, config: FederationConfig, store: Store) -> Trust:
    """The keys in a federation's folder, and the nonces its journal holds.

    Raises:
        ValueError: The coordinator has no key, or a list is damaged.
    """
    client_keys(folder)
    nonces = {row.nonce for row in store.contributions()}
    return Trust(folder, coordinator_key(folder), config.clock_skew_s, config.sealed, nonces=nonces)

"""What a member does: advertise, deal, mask, confirm, open; once each, in this order.

A coordinator may lie. What protects the member's vector is what it refuses: keys that a member did
not sign, too few members, and, above all, a second list of survivors. Of a survivor it opens the
share of the seed, of a dropped member that of the mask key; who got both of one member could take
its masks off. It therefore signs one list, and opens nothing before as many members as the
threshold have signed the same one: another such list would need a member that signs two.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anabranch.wire.errors import WireError
from anabranch.wire.keys import PrivateKey
from anabranch.wire.secure import agreement
from anabranch.wire.secure.fixed import Words
from anabranch.wire.secure.masks import add_mask, take_mask
from anabranch.wire.secure.messages import (
    Roster,
    most_bytes,
    numbers,
    parse,
    read_roster,
    read_signed,
    sign,
)
from anabranch.wire.secure.session import SecureSession
from anabranch.wire.secure.shamir import SHARE_BYTES, deal
from anabranch.wire.signing import KeyRing
from anabranch.wire.v1 import secure_pb2 as pb

ADVERTISED, DEALT, MASKED, CONFIRMED, OPENED = range(1, 6)
_STEPS = ("begun", "advertised", "dealt", "masked", "confirmed", "opened")


@dataclass
class SecureMember:
    """One member of one session. Its secrets are drawn here and never leave the node.

    Attributes:
        session: What it takes part in.
        key: Signs what it says; its name is the member's.
        ring: The other members' keys, as this node was given them by somebody other than the
            coordinator; whoever is not on it is no member.
    """

    session: SecureSession
    key: PrivateKey
    ring: KeyRing
    _phase: int = 0
    _share_secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _mask_secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _seed: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _advertisement: bytes = b""
    _roster: Roster | None = None
    _dealers: tuple[int, ...] = ()
    _survivors: tuple[int, ...] = ()
    _held: dict[int, bytes] = field(default_factory=dict, repr=False)  # both shares, by dealer

    def advertise(self) -> bytes:
        """Phase 1: this member's keys, signed."""
        self._enter(ADVERTISED)
        body = pb.Advertisement(
            session=self.session.digest,
            client=self.key.name,
            share_key=agreement.public_of(self._share_secret),
            mask_key=agreement.public_of(self._mask_secret),
            seed_digest=agreement.seed_digest(self.session.digest, self._seed),
        )
        self._advertisement = sign("advertise", body, self.key)
        return self._advertisement

    def deal(self, roster: bytes) -> bytes:
        """Phase 2: shares of this member's mask key and seed, sealed for each member.

        Args:
            roster: Everybody's advertisement (``messages.Roster``), as it came.

        Raises:
            WireError: As ``read_roster``; ``meta``: it does not hold this member's own
                advertisement as it was made.
        """
        self._enter(DEALT)
        found = read_roster(roster, self.session, self.ring)
        mine = pb.Roster.FromString(roster).advertisements
        if self._advertisement not in mine:
            raise WireError("meta", "the roster does not hold this member's own keys")
        self._roster, threshold = found, self.session.threshold
        own, count = self._number, len(found.members)
        shares = [
            key_share + seed_share
            for key_share, seed_share in zip(
                deal(self._mask_secret, threshold, count),
                deal(self._seed, threshold, count),
                strict=True,
            )
        ]
        self._held[own] = shares[own]
        body = pb.Dealing(
            session=self.session.digest,
            roster=found.digest,
            client=self.key.name,
            sealed=[self._sealed(number, pair) for number, pair in enumerate(shares)],
            digests=[digests(self._bound, own, number, pair) for number, pair in enumerate(shares)],
        )
        return sign("deal", body, self.key)

    def mask(self, delivery: bytes, vector_D: Words) -> bytes:
        """Phase 3: the vector under this member's masks; it is changed in place.

        Shares that cannot be opened are done without: their dealer is masked with all the same, or
        one member could keep all others from taking part.

        Args:
            delivery: What the others dealt (``pb.Delivery``), as it came.
            vector_D: ``SecureSession.fixed.encode`` of the member's vector [D].

        Raises:
            WireError: The delivery does not fit the roster, ``threshold``: fewer dealt, or fewer
                of their shares can be opened.
            ValueError: The vector is of another length or kind.
        """
        fixed, roster = self.session.fixed, self._known
        if vector_D.shape != (self.session.entries,) or vector_D.dtype != fixed.dtype:
            raise ValueError(
                f"the vector is {vector_D.shape} of {vector_D.dtype}, "
                f"the session's has {self.session.entries} entries of {fixed.dtype}"
            )
        self._enter(MASKED)
        message = parse(pb.Delivery, delivery, most_bytes(self.session, "deal"))
        dealers = numbers(message.dealers, len(roster.members), "dealers")
        if len(message.sealed) != len(dealers) or self._number not in dealers:
            raise WireError("counts", "the delivery lacks shares, or this member")
        sealed = dict(zip(dealers, message.sealed, strict=True))
        self._dealers = dealers
        self._held.update(self._opened(sealed))
        if len(self._held) < self.session.threshold:
            raise WireError(
                "threshold",
                f"shares of {len(self._held)} members came, {self.session.threshold} are needed",
            )
        add_mask(vector_D, self._seed)
        own = self._number
        for other in dealers:
            if other != own:
                apply = add_mask if own < other else take_mask
                apply(vector_D, self._pair_seed(other))
        little = vector_D.astype(vector_D.dtype.newbyteorder("<"), copy=False)
        body = pb.Masked(
            session=self.session.digest,
            roster=roster.digest,
            client=self.key.name,
            dealers=dealers,
            vector=little.tobytes(),
        )
        return sign("mask", body, self.key)

    def confirm(self, survivors: bytes) -> bytes:
        """Phase 4: sign the one list of survivors that this member will help to open.

        Args:
            survivors: Whose vectors the coordinator says it has (``pb.Survivors``), as it came.

        Raises:
            WireError: ``threshold``: too few; ``counts``: one did not deal, or this member's own
                vector is not among them.
        """
        self._enter(CONFIRMED)
        message = parse(pb.Survivors, survivors, most_bytes(self.session, "confirm"))
        found = numbers(message.members, len(self._known.members), "survivors")
        if len(found) < self.session.threshold:
            raise WireError(
                "threshold",
                f"the sum of {len(found)} vectors is to be opened, and the threshold is "
                f"{self.session.threshold}",
            )
        if self._number not in found or not set(found) <= set(self._dealers):
            raise WireError("counts", "a survivor did not deal, or this member is none of them")
        self._survivors = found
        body = pb.Confirmation(
            session=self.session.digest,
            roster=self._known.digest,
            client=self.key.name,
            survivors=found,
        )
        return sign("confirm", body, self.key)

    def open(self, confirmations: bytes) -> bytes:
        """Phase 5: a share for each member, of the seed or of the mask key; all secrets go.

        Args:
            confirmations: What enough survivors signed (``pb.Confirmations``), as it came.

        Raises:
            WireError: As ``read_signed``; ``equivocation``: somebody signed another list than this
                member; ``threshold``: too few signed.
        """
        self._enter(OPENED)
        most = self.session.members * (most_bytes(self.session, "confirm") + 8)
        message = parse(pb.Confirmations, confirmations, most)
        if len(message.signed) > len(self._known.members):
            raise WireError("counts", "there are more confirmations than members")
        survivors = {self._known.names[number] for number in self._survivors}
        signers = set()
        for blob in message.signed:
            theirs = read_signed("confirm", blob, pb.Confirmation, self.session, self.ring, None)
            if theirs.roster != self._known.digest or tuple(theirs.survivors) != self._survivors:
                raise WireError(
                    "equivocation", f"{theirs.client} signed another list of survivors or members"
                )
            if theirs.client not in survivors:
                raise WireError("counts", f"{theirs.client} signed, and is no survivor")
            signers.add(theirs.client)
        if len(signers) < self.session.threshold:
            raise WireError(
                "threshold",
                f"{len(signers)} members signed, and the threshold is {self.session.threshold}",
            )
        owners = [number for number in self._dealers if number in self._held]
        body = pb.Opening(
            session=self.session.digest,
            roster=self._known.digest,
            client=self.key.name,
            owners=owners,
            shares=[self._share_to_open(number) for number in owners],
        )
        self._share_secret = self._mask_secret = self._seed = b""
        self._held.clear()
        return sign("open", body, self.key)

    def to_bytes(self) -> bytes:
        """All of the member, to be kept on its node between phases: it holds its secrets."""
        return pb.MemberState(
            session=self.session.digest,
            client=self.key.name,
            phase=self._phase,
            share_secret=self._share_secret,
            mask_secret=self._mask_secret,
            seed=self._seed,
            advertisement=self._advertisement,
            roster=self._roster.blob if self._roster else b"",
            dealers=self._dealers,
            survivors=self._survivors,
            owners=list(self._held),
            shares=list(self._held.values()),
        ).SerializeToString()

    @classmethod
    def from_bytes(
        cls, state: bytes, session: SecureSession, key: PrivateKey, ring: KeyRing
    ) -> SecureMember:
        """The member that ``to_bytes`` kept.

        Raises:
            WireError: ``phase``: it is of another session or member; or a member of its roster is
                not on the ring any more.
        """
        kept = pb.MemberState.FromString(state)
        if kept.session != session.digest or kept.client != key.name:
            raise WireError("phase", "this node takes part in another session")
        return cls(
            session,
            key,
            ring,
            kept.phase,
            kept.share_secret,
            kept.mask_secret,
            kept.seed,
            kept.advertisement,
            read_roster(kept.roster, session, ring) if kept.roster else None,
            tuple(kept.dealers),
            tuple(kept.survivors),
            dict(zip(kept.owners, kept.shares, strict=True)),
        )

    def _enter(self, phase: int) -> None:
        """Take the next step; whatever fails in it, it is never taken again."""
        if phase != self._phase + 1:
            asked, done = _STEPS[phase], _STEPS[min(self._phase, OPENED)]
            raise WireError(
                "phase", f"{self.key.name} has {done}, and cannot be asked to have {asked}"
            )
        self._phase = phase

    @property
    def _known(self) -> Roster:
        if self._roster is None:
            raise WireError("phase", f"{self.key.name} knows no roster yet")
        return self._roster

    @property
    def _number(self) -> int:
        return self._known.names.index(self.key.name)

    @property
    def _bound(self) -> bytes:
        return self.session.digest + self._known.digest

    def _sealed(self, number: int, shares: bytes) -> bytes:
        """Both shares for a member; nothing for this one itself."""
        if number == self._number:
            return b""
        public = self._known.members[number].share_key
        return agreement.seal_shares(
            self._share_secret, public, self._bound, self._number, number, shares
        )

    def _opened(self, sealed: Mapping[int, bytes]) -> dict[int, bytes]:
        """What of the sealed shares can be opened."""
        found = {}
        for number, blob in sealed.items():
            if number != self._number:
                public = self._known.members[number].share_key
                try:
                    shares = agreement.open_shares(
                        self._share_secret, public, self._bound, number, self._number, blob
                    )
                except WireError:
                    continue
                if len(shares) == 2 * SHARE_BYTES:
                    found[number] = shares
        return found

    def _pair_seed(self, other: int) -> bytes:
        own = self._number
        pair = (min(own, other), max(own, other))
        public = self._known.members[other].mask_key
        return agreement.pair_seed(self._mask_secret, public, self._bound, pair)

    def _share_to_open(self, number: int) -> bytes:
        """Of a survivor the seed's, of one that dropped out the mask key's."""
        shares = self._held[number]
        return shares[SHARE_BYTES:] if number in self._survivors else shares[:SHARE_BYTES]


def digests(bound: bytes, dealer: int, holder: int, shares: bytes) -> bytes:
    """What a dealer says of both shares that it gave a holder."""
    parts: Sequence[tuple[str, bytes]] = (
        ("key", shares[:SHARE_BYTES]),
        ("seed", shares[SHARE_BYTES:]),
    )
    return b"".join(
        agreement.share_digest(bound, dealer, holder, what, share) for what, share in parts
    )

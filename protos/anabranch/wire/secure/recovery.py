"""What the coordinator does: hand on what members say, add up their vectors, take the masks off.

Members that vanish in any phase cost only themselves, while as many as the threshold remain. A
message that is refused does not count as sent. Shape legend: D entries of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anabranch.wire.errors import WireError
from anabranch.wire.secure import agreement
from anabranch.wire.secure.fixed import Words
from anabranch.wire.secure.masks import add_mask, take_mask
from anabranch.wire.secure.messages import (
    Roster,
    advertised,
    numbers,
    read_roster,
    read_signed,
    write_roster,
)
from anabranch.wire.secure.session import SecureSession
from anabranch.wire.secure.shamir import SHARE_BYTES, combine
from anabranch.wire.signing import KeyRing
from anabranch.wire.v1 import secure_pb2 as pb


@dataclass
class Recovery:
    """The coordinator's side of one session: ``take_…`` what members say, then hand on the rest.

    Attributes:
        session: Of which group and round.
        ring: The enrolled keys.
    """

    session: SecureSession
    ring: KeyRing
    _advertisements: dict[str, bytes] = field(default_factory=dict)
    _keys: set[bytes] = field(default_factory=set)
    _roster: Roster | None = None
    _dealings: dict[int, pb.Dealing] = field(default_factory=dict)
    _dealers: tuple[int, ...] | None = None
    _sum: Words | None = None  # [D]
    _masked: set[int] = field(default_factory=set)
    _survivors: tuple[int, ...] | None = None
    _confirmations: dict[int, bytes] = field(default_factory=dict)
    _opened: dict[int, dict[int, bytes]] = field(default_factory=dict)  # by owner, by holder

    def take_advertisement(self, client: str, blob: bytes) -> None:
        """Phase 1.

        Raises:
            WireError: As ``messages.advertised``; ``phase``: the roster is closed, or it is this
                client's second; ``values``: a key that came before.
        """
        member = advertised(blob, self.session, self.ring, client)
        if self._roster is not None or client in self._advertisements:
            raise WireError("phase", f"{client} advertised late, or twice")
        if len(self._advertisements) == self.session.members:
            raise WireError("counts", f"the group has its {self.session.members} members already")
        keys = {member.share_key, member.mask_key}
        if len(keys) < 2 or keys & self._keys:
            raise WireError("values", f"{client} advertised one key twice, or another member's")
        self._keys |= keys
        self._advertisements[client] = blob

    def roster(self) -> Roster:
        """What phase 2 hands to every member; no other joins any more.

        Raises:
            WireError: ``threshold``: too few advertised.
        """
        if self._roster is None:
            rows = [self._advertisements[name] for name in sorted(self._advertisements)]
            self._roster = read_roster(write_roster(rows), self.session, self.ring)
        return self._roster

    def take_dealing(self, client: str, blob: bytes) -> None:
        """Phase 2.

        Raises:
            WireError: As ``read_signed``; ``phase``: late, twice, or for another roster;
                ``counts``: not a share for every other member.
        """
        body = read_signed("deal", blob, pb.Dealing, self.session, self.ring, client)
        number = self._number(client, body.roster)
        if self._dealers is not None or number in self._dealings:
            raise WireError("phase", f"{client} dealt late, or twice")
        count = len(self.roster().members)
        sizes = [agreement.SEALED_BYTES] * count
        sizes[number] = 0
        if [len(part) for part in body.sealed] != sizes or (
            [len(part) for part in body.digests] != [2 * agreement.DIGEST_BYTES] * count
        ):
            raise WireError("counts", f"{client} did not deal a share to every other member")
        self._dealings[number] = body

    def close_dealing(self) -> None:
        """End phase 2: whoever has not dealt yet is masked with by nobody.

        Raises:
            WireError: ``threshold``: too few dealt.
        """
        if self._dealers is None:
            self._enough(len(self._dealings), "dealt")
            self._dealers = tuple(sorted(self._dealings))
            self._sum = np.zeros(self.session.entries, self.session.fixed.dtype)

    def delivery(self, client: str) -> bytes:
        """What phase 3 hands to a member that dealt: the shares it was dealt.

        Raises:
            WireError: As ``close_dealing``.
        """
        self.close_dealing()
        assert self._dealers is not None
        number = self.roster().names.index(client)
        sealed = [self._dealings[dealer].sealed[number] for dealer in self._dealers]
        return pb.Delivery(dealers=self._dealers, sealed=sealed).SerializeToString()

    def take_masked(self, client: str, blob: bytes) -> None:
        """Phase 3: add a masked vector to the sum; it is not kept.

        Raises:
            WireError: As ``read_signed``; ``phase``: late, twice, or for another roster;
                ``layout``: a vector of another length, or masked with other members.
        """
        body = read_signed("mask", blob, pb.Masked, self.session, self.ring, client)
        number = self._number(client, body.roster)
        if self._sum is None or self._survivors is not None or number in self._masked:
            raise WireError("phase", f"{client} sent its vector early, late, or twice")
        if len(body.vector) != self.session.vector_bytes or tuple(body.dealers) != self._dealers:
            raise WireError(
                "layout",
                f"the vector of {client} has {len(body.vector)} bytes, not "
                f"{self.session.vector_bytes}, or other masks than asked for",
            )
        little = self._sum.dtype.newbyteorder("<")
        self._sum += np.frombuffer(body.vector, little)
        self._masked.add(number)

    def survivors(self) -> bytes:
        """What phase 4 hands to every member whose vector came.

        Raises:
            WireError: ``threshold``: too few vectors came.
        """
        if self._survivors is None:
            self._enough(len(self._masked), "sent their vectors")
            self._survivors = tuple(sorted(self._masked))
        return pb.Survivors(members=self._survivors).SerializeToString()

    def take_confirmation(self, client: str, blob: bytes) -> None:
        """Phase 4.

        Raises:
            WireError: As ``read_signed``; ``phase``: early, twice, or for another roster;
                ``equivocation``: it is of another list of survivors.
        """
        body = read_signed("confirm", blob, pb.Confirmation, self.session, self.ring, client)
        number = self._number(client, body.roster)
        if self._survivors is None or number in self._confirmations:
            raise WireError("phase", f"{client} confirmed early, or twice")
        if number not in self._survivors or tuple(body.survivors) != self._survivors:
            raise WireError("equivocation", f"{client} signed another list of survivors")
        self._confirmations[number] = blob

    def confirmations(self) -> bytes:
        """What phase 5 hands to every member that confirmed.

        Raises:
            WireError: ``threshold``: too few confirmed.
        """
        self._enough(len(self._confirmations), "confirmed")
        signed = [self._confirmations[number] for number in sorted(self._confirmations)]
        return pb.Confirmations(signed=signed).SerializeToString()

    def take_opening(self, client: str, blob: bytes) -> None:
        """Phase 5.

        Raises:
            WireError: As ``read_signed``; ``phase``: early, twice, or for another roster;
                ``share``: one is not the share that was dealt; nothing of the message counts then.
        """
        body = read_signed("open", blob, pb.Opening, self.session, self.ring, client)
        holder = self._number(client, body.roster)
        if holder not in self._confirmations:
            raise WireError("phase", f"{client} opens early, or what it did not confirm")
        owners = numbers(body.owners, len(self.roster().members), "owners")
        if len(body.shares) != len(owners) or not set(owners) <= set(self._dealings):
            raise WireError("counts", f"{client} opens shares of members that did not deal")
        found = dict(zip(owners, body.shares, strict=True))
        for owner, share in found.items():
            self._check_share(owner, holder, share)
            if holder in self._opened.get(owner, {}):
                raise WireError("phase", f"{client} opens twice")
        for owner, share in found.items():
            self._opened.setdefault(owner, {})[holder] = share

    def total(self) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """The sum of the survivors' vectors [D], and who they are.

        Raises:
            WireError: ``threshold``: too few opened some share. ``share``: what a member dealt
                gives another secret than it promised; the sum is lost, and the member is named.
        """
        if self._sum is None or self._survivors is None:
            raise WireError("phase", "no vector came yet")
        assert self._dealers is not None
        members, sum_D = self.roster().members, self._sum.copy()
        for owner in self._survivors:
            seed = self._secret(owner)
            if agreement.seed_digest(self.session.digest, seed) != members[owner].seed_digest:
                raise _dealt_wrongly(members[owner].client)
            take_mask(sum_D, seed)
        for owner in self._dropped:
            secret = self._secret(owner)
            if agreement.public_of(secret) != members[owner].mask_key:
                raise _dealt_wrongly(members[owner].client)
            for other in self._survivors:
                # The survivor added it where its own number is the smaller.
                undo = take_mask if other < owner else add_mask
                pair = (min(owner, other), max(owner, other))
                public = members[other].mask_key
                undo(sum_D, agreement.pair_seed(secret, public, self._bound, pair))
        names = tuple(members[number].client for number in self._survivors)
        return self.session.fixed.decode(sum_D, len(names)), names

    @property
    def _dropped(self) -> tuple[int, ...]:
        """Members that the survivors masked with, and whose own vector did not come."""
        return tuple(number for number in self._dealers or () if number not in self._masked)

    @property
    def _bound(self) -> bytes:
        return self.session.digest + self.roster().digest

    def _number(self, client: str, roster: bytes) -> int:
        if self._roster is None or roster != self._roster.digest:
            raise WireError("phase", f"{client} answers to another roster")
        if client not in self._roster.names:
            raise WireError("phase", f"{client} is not on the roster")
        return self._roster.names.index(client)

    def _enough(self, count: int, did: str) -> None:
        if count < self.session.threshold:
            raise WireError(
                "threshold", f"{count} members {did}, and the threshold is {self.session.threshold}"
            )

    def _check_share(self, owner: int, holder: int, share: bytes) -> None:
        """Compare a share with what its dealer said of it."""
        assert self._survivors is not None
        survived = owner in self._survivors
        promised = self._dealings[owner].digests[holder]
        half = slice(agreement.DIGEST_BYTES, None) if survived else slice(agreement.DIGEST_BYTES)
        what = "seed" if survived else "key"
        found = agreement.share_digest(self._bound, owner, holder, what, share)
        if len(share) != SHARE_BYTES or found != promised[half]:
            name = self.roster().members[owner].client
            raise WireError("share", f"this is not the share that {name} dealt")

    def _secret(self, owner: int) -> bytes:
        """A survivor's seed, or the mask key of one that dropped out."""
        shares = self._opened.get(owner, {})
        chosen = sorted(shares)[: self.session.threshold]
        return combine({holder + 1: shares[holder] for holder in chosen}, self.session.threshold)


def _dealt_wrongly(client: str) -> WireError:
    return WireError("share", f"{client} dealt shares of another secret than it promised")

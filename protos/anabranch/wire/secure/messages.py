"""What crosses the network, written and read: nothing is believed before it is bounded.

A member signs a prefix, the phase and the sha256 of what it says; the bytes checked are those that
came. Unknown fields are covered by the signature and mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeVar

from google.protobuf.message import DecodeError, Message

from anabranch.wire.errors import WireError
from anabranch.wire.keys import NAME, PrivateKey
from anabranch.wire.limits import KEY_BYTES as SIGNATURE_LIMIT
from anabranch.wire.secure import agreement
from anabranch.wire.secure.agreement import DIGEST_BYTES, KEY_BYTES, SEALED_BYTES
from anabranch.wire.secure.session import MOST_MEMBERS, SecureSession
from anabranch.wire.secure.shamir import SHARE_BYTES
from anabranch.wire.signing import KeyRing
from anabranch.wire.v1 import secure_pb2 as pb

Phase = Literal["advertise", "deal", "mask", "confirm", "open"]

_SIGNED = b"anabranch.secure/1\0"
_ENVELOPE_BYTES = 512
"""Session, roster, name, key id, signature and tags of a member's message, at their largest."""
_MEMBER_BYTES = SEALED_BYTES + 2 * DIGEST_BYTES + SHARE_BYTES + 32
"""What any message holds for each member, at its largest."""
_ADVERTISEMENT_BYTES = _ENVELOPE_BYTES + 128

M = TypeVar("M", bound=Message)
Said = TypeVar("Said", pb.Advertisement, pb.Dealing, pb.Masked, pb.Confirmation, pb.Opening)
"""What a member says in a phase."""


def most_bytes(session: SecureSession, phase: Phase) -> int:
    """The largest message that a member may send in a phase."""
    vector = session.vector_bytes if phase == "mask" else 0
    return _ADVERTISEMENT_BYTES + session.members * _MEMBER_BYTES + vector


def sign(phase: Phase, body: Message, key: PrivateKey) -> bytes:
    """What a member says, signed."""
    return sign_raw(phase, body.SerializeToString(deterministic=True), key)


def sign_raw(phase: Phase, raw: bytes, key: PrivateKey) -> bytes:
    """The bytes of a body, signed."""
    signature = key.sign(_covered(phase, raw))
    return pb.Signed(body=raw, key_id=key.public.id, signature=signature).SerializeToString()


def read_signed(
    phase: Phase,
    blob: bytes,
    kind: type[Said],
    session: SecureSession,
    ring: KeyRing,
    client: str | None,
) -> Said:
    """Read what a member says, and check who signed it.

    Args:
        phase: The phase it is to be of.
        blob: The message, as it came.
        kind: What its body is.
        session: Bounds it, and is named in it.
        ring: The members' keys.
        client: Whose it has to be; None takes the one it names.

    Raises:
        WireError: As ``KeyRing.check``; ``too-large``; ``manifest``: it is not such a message;
            ``phase``: it was made for another session; ``meta``: in another member's name.
    """
    signed = parse(pb.Signed, blob, most_bytes(session, phase))
    if max(len(signed.key_id), len(signed.signature)) > SIGNATURE_LIMIT:
        raise WireError("meta", "the key id or the signature is too long")
    body = parse(kind, signed.body, most_bytes(session, phase))
    named = body.client
    if not NAME.fullmatch(named) or (client is not None and named != client):
        raise WireError("meta", f"it is of {named[:100]!r}, asked for {client!r}")
    ring.check(signed.key_id, signed.signature, _covered(phase, signed.body), named)
    if body.session != session.digest:
        raise WireError("phase", f"{named} made it for another round, group or configuration")
    return body


def parse(kind: type[M], blob: bytes, most: int) -> M:
    """A protobuf message within a bound.

    Raises:
        WireError: ``too-large``, or ``manifest``: it is none.
    """
    if len(blob) > most:
        raise WireError("too-large", f"the message has {len(blob)} bytes, more than {most}")
    try:
        return kind.FromString(blob)
    except DecodeError as error:
        raise WireError("manifest", f"not a message of this phase: {error}") from None


def numbers(values: Sequence[int], members: int, what: str) -> tuple[int, ...]:
    """Members' numbers as they came.

    Raises:
        WireError: ``counts``: they do not rise, or one is nobody's.
    """
    found = tuple(values)
    if any(later <= earlier for earlier, later in pairwise(found)):
        raise WireError("counts", f"the {what} are not in rising order")
    if found and found[-1] >= members:
        raise WireError("counts", f"the {what} name member {found[-1]} of {members}")
    return found


@dataclass(frozen=True)
class Member:
    """One row of a roster.

    Attributes:
        client: Its name.
        share_key: X25519 key that shares for it are sealed to.
        mask_key: X25519 key that pairwise masks are drawn from.
        seed_digest: That of the seed of its own mask.
    """

    client: str
    share_key: bytes
    mask_key: bytes
    seed_digest: bytes


@dataclass(frozen=True)
class Roster:
    """The members of a session in the order of their names, which numbers them.

    Attributes:
        blob: As it travels: their signed advertisements.
        members: What those say.
    """

    blob: bytes
    members: tuple[Member, ...]

    @cached_property
    def digest(self) -> bytes:
        """Names the roster in everything that is said after it; 32 bytes."""
        return hashlib.sha256(b"anabranch.roster/1\0" + self.blob).digest()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.client for member in self.members)


def advertised(blob: bytes, session: SecureSession, ring: KeyRing, client: str | None) -> Member:
    """Read an advertisement.

    Raises:
        WireError: As ``read_signed``; ``values``: a key or digest of another length; ``payload``: a
            key that makes no secret.
    """
    body = read_signed("advertise", blob, pb.Advertisement, session, ring, client)
    fields = (body.share_key, body.mask_key, body.seed_digest)
    if any(len(field) != KEY_BYTES for field in fields):
        raise WireError("values", f"a key or digest of {body.client} is not {KEY_BYTES} bytes")
    for key in (body.share_key, body.mask_key):
        agreement.check_key(key)
    return Member(body.client, *fields)


def write_roster(advertisements: Sequence[bytes]) -> bytes:
    """A roster as it travels, of advertisements in the order of names."""
    return pb.Roster(advertisements=advertisements).SerializeToString()


def read_roster(blob: bytes, session: SecureSession, ring: KeyRing) -> Roster:
    """Read a roster, and check every advertisement in it.

    Raises:
        WireError: As ``advertised``; ``counts``: too many, too few, out of order, twice; or two
            members have one key.
    """
    most = session.members * (_ADVERTISEMENT_BYTES + 8) + 64
    rows = parse(pb.Roster, blob, most).advertisements
    if not session.threshold <= len(rows) <= min(session.members, MOST_MEMBERS):
        raise WireError(
            "threshold",
            f"the roster has {len(rows)} members, not {session.threshold} to {session.members}",
        )
    members = tuple(advertised(row, session, ring, None) for row in rows)
    names = [member.client for member in members]
    if any(later <= earlier for earlier, later in pairwise(names)):
        raise WireError("counts", "the roster is not in the order of names")
    keys = [key for member in members for key in (member.share_key, member.mask_key)]
    if len(set(keys)) < len(keys):
        raise WireError("counts", "two keys of the roster are the same")
    return Roster(blob, members)


def _covered(phase: Phase, body: bytes) -> bytes:
    """What a signature covers; the digest, so that a large vector is read once."""
    return _SIGNED + phase.encode() + b"\0" + hashlib.sha256(body).digest()

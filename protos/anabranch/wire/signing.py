"""Signatures under messages and plans: what is signed, and when a signature counts.

A message's signature stands last in its manifest and covers every byte of the manifest before it:
format, kind, federation, run, round, client, base, start, nonce, time of issue, codec, and the
digest of every payload. The bytes are those on the wire, so nothing has to be serialised alike on
two machines. A plan's covers the bytes of its JSON text. Each kind of thing is signed under a
prefix of its own, so that a signature can never be passed off as one under another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from anabranch.wire.errors import WireError
from anabranch.wire.keys import PrivateKey, PublicKey
from anabranch.wire.manifest import Manifest

MESSAGE = b"anabranch.message/1\0"
PLAN = b"anabranch.plan/1\0"
PUBLISHED = b"anabranch.published/1\0"
RECEIPT = b"anabranch.receipt/1\0"

PLAN_SIGNER_KEY = "plan-key-id"
PLAN_SIGNATURE_KEY = "plan-signature"
"""Under which a plan's signature travels beside it in a Flower message."""


@dataclass(frozen=True)
class KeyRing:
    """The public keys a receiver knows.

    Attributes:
        enrolled: Keys that count, by id. One name may have several: an old key and a new one.
        revoked: Keys that count no longer; a key in both is revoked.
    """

    enrolled: Mapping[bytes, PublicKey]
    revoked: Mapping[bytes, PublicKey] = field(default_factory=dict)

    def check(self, key_id: bytes, signature: bytes, data: bytes, name: str | None) -> None:
        """Check a signature.

        Args:
            key_id: The key it claims.
            signature: What is to be checked.
            data: What it is to cover, prefix included.
            name: Whose the key has to be; None: anybody's on the ring.

        Raises:
            WireError: ``unsigned``, ``revoked-key``, ``unknown-key``, ``wrong-key`` or
                ``bad-signature``.
        """
        if not signature:
            raise WireError("unsigned", "there is no signature")
        if key_id in self.revoked:
            raise WireError("revoked-key", f"key {key_id.hex()} was revoked")
        key = self.enrolled.get(key_id)
        if key is None:
            raise WireError("unknown-key", f"key {key_id.hex() or 'without an id'} is not enrolled")
        if name is not None and key.name != name:
            raise WireError("wrong-key", f"key {key_id.hex()} is {key.name}'s, not {name}'s")
        if not key.verifies(signature, data):
            raise WireError("bad-signature", f"the signature is not one of key {key_id.hex()}")


def check_message(manifest: Manifest, ring: KeyRing, name: str | None = None) -> None:
    """Check the signature under a message that was read; its payloads are bound by digests.

    Raises:
        WireError: As ``KeyRing.check``.
    """
    ring.check(manifest.key_id, manifest.signature, MESSAGE + manifest.signed, name)


def sign_plan(plan: str, key: PrivateKey) -> bytes:
    """The signature under a plan's JSON text."""
    return key.sign(PLAN + plan.encode())


def check_plan(plan: str, key_id: bytes, signature: bytes, ring: KeyRing) -> None:
    """Check the signature under a plan's JSON text.

    Raises:
        WireError: As ``KeyRing.check``.
    """
    ring.check(key_id, signature, PLAN + plan.encode(), None)

"""Sealing: an update that only the coordinator opens, whatever carries it there.

X25519 between a key made for this one message and the coordinator's, HKDF-SHA256 over both public
keys, ChaCha20-Poly1305. A sealed update is the sender's public key and the ciphertext; what is
sealed is signed first, so that its sender is known once it is open. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from anabranch.wire.errors import WireError

SEALED_STYPE = "anabranch.sealed/1"
"""``Array.stype`` of a sealed update."""

PUBLIC_BYTES, TAG_BYTES = 32, 16
SEAL_BYTES = PUBLIC_BYTES + TAG_BYTES
"""What sealing adds to a message."""

_INFO = b"anabranch.seal/1\0"
# Each message has a key of its own, under which this is the only one.
_NONCE = bytes(12)


@dataclass(frozen=True, eq=False)
class SealKey:
    """What opens sealed updates. A coordinator makes one for each round and writes it nowhere."""

    secret: X25519PrivateKey

    @cached_property
    def public(self) -> bytes:
        """What clients seal to; 32 bytes."""
        return self.secret.public_key().public_bytes_raw()

    def open(self, sealed: bytes | memoryview, most_bytes: int) -> bytes:
        """The message that was sealed.

        Args:
            sealed: As it came.
            most_bytes: Most bytes the message may have.

        Raises:
            WireError: ``too-large``; or ``seal``: sealed to another key, or changed on the way.
        """
        if len(sealed) > most_bytes + SEAL_BYTES:
            raise WireError("too-large", f"the sealed update has {len(sealed)} bytes")
        sender, rest = bytes(sealed[:PUBLIC_BYTES]), sealed[PUBLIC_BYTES:]
        try:
            shared = self.secret.exchange(X25519PublicKey.from_public_bytes(sender))
            return _cipher(shared, sender, self.public).decrypt(_NONCE, rest, None)
        # ValueError: no point of the curve, or one that makes any secret the same.
        except (InvalidTag, ValueError):
            raise WireError("seal", "the update is not sealed to this round's key") from None


def new_seal_key() -> SealKey:
    """A fresh key from the system's randomness."""
    return SealKey(X25519PrivateKey.generate())


def seal(message: bytes, recipient: bytes) -> bytes:
    """Seal a message.

    Args:
        message: What to seal.
        recipient: ``SealKey.public``.

    Raises:
        ValueError: The recipient is no usable key.
    """
    own = X25519PrivateKey.generate()
    sender = own.public_key().public_bytes_raw()
    shared = own.exchange(X25519PublicKey.from_public_bytes(recipient))
    return sender + _cipher(shared, sender, recipient).encrypt(_NONCE, message, None)


def _cipher(shared: bytes, sender: bytes, recipient: bytes) -> ChaCha20Poly1305:
    info = _INFO + sender + recipient
    return ChaCha20Poly1305(HKDF(SHA256(), 32, salt=None, info=info).derive(shared))

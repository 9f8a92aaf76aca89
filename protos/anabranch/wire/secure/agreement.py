"""Keys that two members share: one per direction for shares, one per pair for a mask.

X25519 (RFC 7748), HKDF-SHA256 over session, roster and both members' numbers, ChaCha20-Poly1305.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from anabranch.wire.errors import WireError
from anabranch.wire.secure.shamir import SHARE_BYTES

KEY_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Two shares under an authenticator."""
DIGEST_BYTES = 16

_NONCE = bytes(12)  # a key seals one message


def public_of(secret: bytes) -> bytes:
    """The public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def check_key(public: bytes) -> None:
    """Refuse a key that no secret can be made with: no point, or one of low order.

    Raises:
        WireError: ``payload``.
    """
    # Every X25519 secret is a multiple of the cofactor: what one makes zero, all do.
    _derive(bytes(KEY_BYTES), public, b"check", b"")


def pair_seed(secret: bytes, public: bytes, bound: bytes, pair: tuple[int, int]) -> bytes:
    """The seed of a pair's mask, the same from both sides.

    Args:
        secret: One's mask key.
        public: The other's.
        bound: The digests of session and roster.
        pair: Their numbers, the smaller first.

    Raises:
        WireError: ``payload``: the other's key makes no secret.
    """
    return _derive(secret, public, b"mask", bound, *pair)


def seal_shares(
    secret: bytes, public: bytes, bound: bytes, sender: int, receiver: int, shares: bytes
) -> bytes:
    """Seal both shares for one member; ``bound`` is session and roster.

    Raises:
        WireError: ``payload``, as ``pair_seed``.
    """
    key = _derive(secret, public, b"share", bound, sender, receiver)
    return ChaCha20Poly1305(key).encrypt(_NONCE, shares, bound)


def open_shares(
    secret: bytes, public: bytes, bound: bytes, sender: int, receiver: int, sealed: bytes
) -> bytes:
    """What ``seal_shares`` sealed.

    Raises:
        WireError: ``seal``: it was sealed under other keys, for another session, roster or member,
            or was changed on the way.
    """
    key = _derive(secret, public, b"share", bound, sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, bound)
    except InvalidTag:
        raise WireError("seal", f"the shares of member {sender} cannot be opened") from None


def seed_digest(session: bytes, seed: bytes) -> bytes:
    """What a member says of the seed of its own mask; 32 bytes."""
    return hashlib.sha256(b"anabranch.seed-digest/1\0" + session + seed).digest()


def share_digest(bound: bytes, dealer: int, holder: int, what: str, share: bytes) -> bytes:
    """What a dealer says of a share that it gave to a holder: that is the one to come back."""
    about = f"{what}\0{dealer}\0{holder}\0".encode()
    return hashlib.sha256(b"anabranch.share/1\0" + bound + about + share).digest()[:DIGEST_BYTES]


def _derive(secret: bytes, public: bytes, use: bytes, bound: bytes, *numbers: int) -> bytes:
    about = b"".join(number.to_bytes(4, "big") for number in numbers)
    info = b"anabranch.secure/1\0" + use + b"\0" + bound + about
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    # No point of the curve, or one with which every secret would be the same.
    except ValueError:
        raise WireError(
            "payload", "a member's key is none that a secret can be made with"
        ) from None
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(shared)

"""Shamir's t-of-n secret sharing (1979) of 32-byte secrets, over one prime field.

A share is 33 bytes whatever the secret. Fewer than t of them tell nothing; any t give it back.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from anabranch.wire.errors import WireError

PRIME = 2**256 + 297
"""The smallest prime above every secret."""
SECRET_BYTES, SHARE_BYTES = 32, 33


def deal(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret, at the points 1 to ``count``.

    Args:
        secret: 32 bytes.
        threshold: Shares that give it back.
        count: Shares to make.

    Raises:
        ValueError: An impossible number of either, or a secret of another length.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
    if not 1 <= threshold <= count:
        raise ValueError(f"a threshold of {threshold} does not fit {count} shares")
    # Highest power first, as Horner's rule reads them; the secret is the constant term.
    terms = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    terms.append(int.from_bytes(secret, "big"))
    shares = []
    for point in range(1, count + 1):
        value = 0
        for term in terms:
            value = (value * point + term) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret that shares were dealt of.

    Args:
        shares: By point, from 1.
        threshold: That of the deal.

    Raises:
        WireError: ``threshold``: too few. ``share``: one is none, or they are not of one deal as
            far as can be told: those beyond the threshold must lie on the others' polynomial.
    """
    if len(shares) < threshold:
        raise WireError("threshold", f"{len(shares)} shares, and {threshold} are needed")
    points = sorted(shares)
    values = {point: _value(point, shares[point]) for point in points}
    basis = {point: values[point] for point in points[:threshold]}
    for point in points[threshold:]:
        if _at(point, basis) != values[point]:
            raise WireError("share", f"the shares up to number {point} are not of one secret")
    secret = _at(0, basis)
    if secret >> (8 * SECRET_BYTES):
        raise WireError("share", "the shares give a number that is no secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(point: int, share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if point < 1 or len(share) != SHARE_BYTES or value >= PRIME:
        raise WireError("share", f"number {point} is no share")
    return value


def _at(where: int, basis: Mapping[int, int]) -> int:
    """The polynomial through these points, by Lagrange's formula."""
    total = 0
    for point, value in basis.items():
        above, below = 1, 1
        for other in basis:
            if other != point:
                above = above * (where - other) % PRIME
                below = below * (point - other) % PRIME
        total += value * above * pow(below, -1, PRIME)
    return total % PRIME

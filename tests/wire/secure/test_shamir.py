from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.wire.secure.conftest import refused

from anabranch.wire.secure.shamir import PRIME, SHARE_BYTES, combine, deal


def test_the_field_is_one_and_holds_every_secret() -> None:
    """Miller-Rabin with the first thirty primes as witnesses."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    primes = [n for n in range(2, 114) if all(n % d for d in range(2, n))]
    for witness in primes:
        powers = [pow(witness, odd << square, PRIME) for square in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers
    assert PRIME > 2**256


@given(st.binary(min_size=32, max_size=32), st.integers(1, 7), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_any_so_many_give_the_secret_back(secret: bytes, threshold: int, more: int) -> None:
    shares = deal(secret, threshold, threshold + more)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    points = dict(enumerate(shares, start=1))
    for chosen in list(combinations(points, threshold))[:20]:
        assert combine({point: points[point] for point in chosen}, threshold) == secret
    assert combine(points, threshold) == secret


def test_fewer_fit_every_secret() -> None:
    # With the missing share free, any secret is possible: what is held says nothing.
    shares = deal(bytes(32), 3, 5)
    held = {1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
    for wanted in (0, 1, 2**256 - 1):
        # The value at 3 of the parabola through (0, wanted) and what is held, by differences.
        third = (wanted - 3 * held[1] + 3 * held[2]) % PRIME
        made = {1: shares[0], 2: shares[1], 3: third.to_bytes(SHARE_BYTES, "big")}
        assert combine(made, 3) == wanted.to_bytes(32, "big")
    assert refused(lambda: combine({1: shares[0], 2: shares[1]}, 3)) == "threshold"


def test_bad_shares_are_refused() -> None:
    shares = dict(enumerate(deal(b"s" * 32, 2, 4), start=1))
    assert refused(lambda: combine({**shares, 2: b"short"}, 2)) == "share"
    assert refused(lambda: combine({**shares, 2: b"\xff" * SHARE_BYTES}, 2)) == "share"
    assert refused(lambda: combine({0: shares[1], 2: shares[2]}, 2)) == "share"
    swapped = {**shares, 3: shares[4], 4: shares[3]}
    assert refused(lambda: combine(swapped, 2)) == "share"
    # One that gives a number of 257 bits: beyond every secret, and within the field.
    beyond = {1: (2**256 + 5).to_bytes(SHARE_BYTES, "big")}
    assert refused(lambda: combine(beyond, 1)) == "share"


def test_impossible_deals_are_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes"):
        deal(bytes(31), 2, 3)
    for threshold, count in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match=f"threshold of {threshold}"):
            deal(bytes(32), threshold, count)

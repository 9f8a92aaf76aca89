from __future__ import annotations

import pytest

from anabranch.wire import WireError
from anabranch.wire.sealing import SEAL_BYTES, SealKey, new_seal_key, seal

MESSAGE = b"an update" * 100


def code(key: SealKey, sealed: bytes, most: int = 10_000) -> str:
    with pytest.raises(WireError) as caught:
        key.open(sealed, most)
    return caught.value.code


def test_only_the_recipient_opens_what_is_sealed() -> None:
    key, other = new_seal_key(), new_seal_key()
    sealed = seal(MESSAGE, key.public)
    assert len(sealed) == len(MESSAGE) + SEAL_BYTES
    assert MESSAGE[:9] not in sealed
    assert key.open(sealed, len(MESSAGE)) == MESSAGE
    assert key.open(memoryview(sealed), len(MESSAGE)) == MESSAGE
    assert code(other, sealed) == "seal"
    assert seal(MESSAGE, key.public) != sealed


@pytest.mark.parametrize("at", [0, 31, 32, 500, -1])
def test_a_change_on_the_way_is_seen(at: int) -> None:
    key = new_seal_key()
    sealed = bytearray(seal(MESSAGE, key.public))
    sealed[at] ^= 1
    assert code(key, bytes(sealed)) == "seal"


def test_cut_long_and_degenerate_ones_are_refused() -> None:
    key = new_seal_key()
    sealed = seal(MESSAGE, key.public)
    for length in (0, 31, 32, 47, len(sealed) - 1):
        assert code(key, sealed[:length]) == "seal"
    assert code(key, sealed + b"x") == "seal"
    assert code(key, sealed, len(MESSAGE) - 1) == "too-large"
    # A point of low order would make the shared secret zero whatever the key.
    assert code(key, bytes(32) + sealed[32:]) == "seal"
    with pytest.raises(ValueError, match=r"."):
        seal(MESSAGE, bytes(32))
    with pytest.raises(ValueError, match="32 bytes"):
        seal(MESSAGE, b"short")

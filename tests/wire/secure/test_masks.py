from __future__ import annotations

import numpy as np
import pytest

from anabranch.wire.secure.masks import add_mask, take_mask

# RFC 8439, appendix A.1, test vector 1: key, nonce and counter of zeros.
RFC_8439 = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_mask_is_the_keystream(bits: int) -> None:
    vector = np.zeros(512 // bits, f"u{bits // 8}")
    add_mask(vector, bytes(32))
    assert vector.astype(f"<u{bits // 8}").tobytes() == RFC_8439


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("entries", [0, 1, 65_535, 65_536, 65_537, 200_001])
def test_what_is_added_is_taken_off_again(bits: int, entries: int) -> None:
    before = np.arange(entries).astype(f"u{bits // 8}")
    vector = before.copy()
    add_mask(vector, b"k" * 32)
    once = vector.copy()
    add_mask(vector, b"l" * 32)
    take_mask(vector, b"k" * 32)
    take_mask(vector, b"l" * 32)
    assert (vector == before).all()
    if entries > 1000:
        # Chunks go on where the one before ended, and no entry stays as it was but by chance.
        assert len(np.unique(once - before)) > 0.9 * entries
        assert (once == before).mean() < 0.001

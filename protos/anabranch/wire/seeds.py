"""Seeds that both ends derive from the manifest: what is drawn from them costs no bits."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from anabranch.wire.manifest import UpdateMeta


def seed_of(meta: UpdateMeta, name: str) -> int:
    """The seed of one tensor of one message: no two clients, rounds or tensors share it.

    Draws that clients shared would not average out in the mean of their updates.
    """
    parts = (meta.federation, meta.run, str(meta.round), meta.client, meta.nonce.hex(), name)
    text = "\0".join(("anabranch.seed/1", *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def random_bytes(seed: int, count: int) -> NDArray[np.uint8]:
    """The first bytes of a seed's stream, the same on every machine and release.

    numpy promises the raw words of a bit generator, and nothing of its distributions.
    """
    words = np.random.PCG64(seed).random_raw(-(-count // 8))
    return words.astype("<u8").view(np.uint8)[:count]

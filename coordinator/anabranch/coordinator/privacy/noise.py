"""Gaussian noise that nobody can take off again: ChaCha20's key stream, by Box and Muller.

A statistical generator will not do. Whoever sees a published adapter sees noise plus a sum, parts
of which they may guess, and outputs of PCG64 give its state away, and with it all other draws
(Bouillaguet, Martinez and Sauvage, 2020). ChaCha20 (RFC 8439) gives no such hold.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

KEY_BYTES = 32
DRAWS_AT_ONCE = 1 << 18
"""Draws made in one go, even: 2 MiB of key stream, so that it does not grow with the model."""


def box_muller(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normal draws, float64 [n], out of uniform words, uint64 [n], n even.

    Of each two words the first makes a radius, the second an angle, and both together two draws
    (Box and Muller, 1958). No draw is beyond 9.5, where an ideal one is with probability 2e-21.
    """
    # Half a step above zero: the logarithm of zero is none.
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-64
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


class GaussianStream:
    """Standard normal draws, one after the other, out of one key.

    Args:
        key: 32 bytes. It is used for one round's noise and no other: the same key draws the same.
    """

    def __init__(self, key: bytes) -> None:
        # Counter and nonce are zero: a key makes one stream.
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def normal(self, count: int) -> NDArray[np.float64]:
        """The next draws, float64 [count]; of an odd number the last one's partner is dropped."""
        even = 2 * ((count + 1) // 2)
        draws = np.empty(even)
        for first in range(0, even, DRAWS_AT_ONCE):
            part = draws[first : first + DRAWS_AT_ONCE]
            part[:] = box_muller(np.frombuffer(self._stream.update(bytes(part.nbytes)), "<u8"))
        return draws[:count]


def noise_source(seed: int | None, server_round: int) -> GaussianStream:
    """A round's noise.

    Args:
        seed: None takes a key from the system. A seed makes one anybody can make, for experiments.
        server_round: The round, so that a seed draws others in each.
    """
    if seed is None:
        return GaussianStream(os.urandom(KEY_BYTES))
    text = f"anabranch noise, seed {seed}, round {server_round}"
    return GaussianStream(hashlib.sha256(text.encode()).digest())

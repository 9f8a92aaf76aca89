"""Masks: a ChaCha20 keystream (RFC 8439) added to a vector modulo 2^32 or 2^64.

Shape legend: D entries of a vector.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from anabranch.wire.secure.fixed import Words

_CHUNK_BYTES = 1 << 18
_ZEROS = memoryview(bytes(_CHUNK_BYTES))
# A key masks one vector of one session: counter and nonce may start at zero every time.
_START = bytes(16)


def add_mask(vector_D: Words, seed: bytes) -> None:
    """Add a seed's mask in place."""
    _apply(vector_D, seed, add=True)


def take_mask(vector_D: Words, seed: bytes) -> None:
    """Take a seed's mask off again, in place."""
    _apply(vector_D, seed, add=False)


def _apply(vector_D: Words, seed: bytes, *, add: bool) -> None:
    stream = Cipher(ChaCha20(seed, _START), mode=None).encryptor()
    little = vector_D.dtype.newbyteorder("<")
    buffer = bytearray(_CHUNK_BYTES)
    step = _CHUNK_BYTES // vector_D.itemsize
    operation = np.add if add else np.subtract
    for start in range(0, len(vector_D), step):
        part = vector_D[start : start + step]
        stream.update_into(_ZEROS[: part.nbytes], buffer)
        operation(part, np.frombuffer(buffer, little, len(part)), out=part)

"""Seeds from words: a draw depends on what it is for alone, so that none moves another."""

from __future__ import annotations

import hashlib


def word_digest(*words: object) -> bytes:
    """sha256 of words, 32 bytes: the same on every machine, another for every purpose.

    Args:
        words: What the draw is for, such as a seed, a name and a number. None may hold a NUL.
    """
    return hashlib.sha256("\0".join(map(str, words)).encode()).digest()


def word_seed(*words: object) -> int:
    """The same as a seed that every generator takes, 63 bits."""
    return int.from_bytes(word_digest(*words)[:8], "little") >> 1

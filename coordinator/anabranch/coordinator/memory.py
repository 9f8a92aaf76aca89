"""How much memory a process of many threads holds on to. Loads no torch."""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8
"""Name of a setting, of glibc's ``malloc.h``."""
HEAPS = 2


def few_heaps() -> bool:
    """Let all threads share a few heaps; called before they begin.

    Each has one of its own otherwise, and freed messages stay in it: under 1,000 uploads that is
    hundreds of megabytes which nobody uses.

    Returns:
        Whether the C library took it; others than glibc have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_ARENA_MAX, HEAPS) == 1

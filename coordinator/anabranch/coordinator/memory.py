"""Memory that a process of many threads gives back. Loads no torch."""

from __future__ import annotations

import ctypes

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
"""Names of settings, of glibc's ``malloc.h``."""
ARENAS = 2
LARGE_BYTES = 128 << 10
"""From here on a buffer is the system's own, and goes back to it when it is freed."""


def give_back() -> bool:
    """Let glibc keep few heaps, and no large buffer that was freed.

    Each thread has a heap of its own otherwise, and freed messages stay in it: under 1,000 uploads
    that is hundreds of megabytes which nobody uses.

    Returns:
        Whether the C library took it; others than glibc have no such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((M_ARENA_MAX, ARENAS), (M_MMAP_THRESHOLD, LARGE_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)

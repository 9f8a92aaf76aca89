"""How much memory a process of many threads holds on to. Loads no torch."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

M_ARENA_MAX = -8
"""Name of a setting, of glibc's ``malloc.h``."""
HEAPS = 2
GROWN_BYTES = 32 << 20
"""Growth after which memory is given back."""
LOOK_S = 0.25
"""Seconds between two looks at how much there is."""
ANYWAY_S = 10.0
"""Seconds after which it is given back without growth: what is freed does not show in it."""
STATM = Path("/proc/self/statm")


def few_heaps() -> bool:
    """Let all threads share a few heaps; called before they begin.

    Each has one of its own otherwise, and freed messages stay in it: under 1,000 uploads that is
    hundreds of megabytes which nobody uses.

    Returns:
        Whether the C library took it; others than glibc have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_ARENA_MAX, HEAPS) == 1


def resident_bytes() -> int:
    """Memory of this process that the system holds for it."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class GivingBack:
    """A thread that gives memory which nobody uses back to the system.

    A heap shrinks by itself only as far as its last byte in use, and holes before that are kept:
    buffers of messages leave more of them with every upload. The thread is one of its own, since
    those of the API have their hands full just when it matters. Other C libraries than glibc have
    no such call, and nothing happens.

    Args:
        grown_bytes: Growth since the last time after which it is done again.
        look_s: Seconds between two looks.
    """

    def __init__(self, grown_bytes: int = GROWN_BYTES, look_s: float = LOOK_S) -> None:
        self._grown_bytes, self._look_s = grown_bytes, look_s
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self._trim is not None and STATM.exists():
            self._thread.start()

    def stop(self) -> None:
        """End; returns once the thread has."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self._trim is not None  # it was started
        least_bytes, given_s = resident_bytes(), time.monotonic()
        while not self._stopped.wait(self._look_s):
            now_bytes, now_s = resident_bytes(), time.monotonic()
            least_bytes = min(least_bytes, now_bytes)
            if now_bytes - least_bytes >= self._grown_bytes or now_s - given_s >= ANYWAY_S:
                self._trim(0)
                least_bytes, given_s = resident_bytes(), time.monotonic()

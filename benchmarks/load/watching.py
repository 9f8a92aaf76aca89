"""What processes hold and spend, read from /proc: their memory's peak, and their CPU time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
EVERY_S = 0.05
"""Seconds between two looks."""
MIB = 1 << 20


@dataclass
class Watched:
    """What was seen of some processes and all they started.

    Attributes:
        idle_bytes: Resident memory when the watch began.
        peak_bytes: The most there was.
        cpu_s: CPU time they spent meanwhile.
    """

    idle_bytes: int
    peak_bytes: int
    cpu_s: float

    @property
    def above_idle_mib(self) -> float:
        """The peak beyond idle, in MiB."""
        return (self.peak_bytes - self.idle_bytes) / MIB


@contextmanager
def watched(pid: int) -> Iterator[Watched]:
    """Watch a process and its descendants while the block runs."""
    began = _cpu_s(pid)
    seen = Watched(held := _resident(pid), held, 0.0)
    over = threading.Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            seen.peak_bytes = max(seen.peak_bytes, _resident(pid))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        seen.cpu_s = _cpu_s(pid) - began


def family(pid: int) -> list[int]:
    """A process and all its descendants that there are now."""
    parents: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(int(words[1]), []).append(int(path.name))
    found = [pid]
    for one in found:
        found.extend(parents.get(one, ()))
    return found


def _resident(pid: int) -> int:
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for one in family(pid):
        try:
            total += int((PROC / str(one) / "statm").read_text().split()[1]) * page
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def _cpu_s(pid: int) -> float:
    ticks = 0
    for one in family(pid):
        try:
            words = (PROC / str(one) / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Its own, and that of children it has waited for.
        ticks += sum(int(word) for word in words[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")

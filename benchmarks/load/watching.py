"""What processes hold and spend, as the kernel counts it: memory's peak, and CPU time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MIB = 1 << 20


@dataclass
class Watched:
    """What was seen of a process and of all it started.

    Attributes:
        idle_bytes: Resident memory before there was any load.
        peak_bytes: The most there was meanwhile, of each at a time of its own.
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
def watched(pid: int, idle_bytes: int | None = None) -> Iterator[Watched]:
    """Watch a process and its descendants while the block runs.

    Args:
        pid: The process.
        idle_bytes: What it held before there was any load; None takes what it holds now.
    """
    for one in family(pid):
        # From now on the kernel's peak is that of the block.
        (PROC / str(one) / "clear_refs").write_text("5")
    idle = idle_bytes
    if idle is None:
        idle = sum(_kilobytes(one, "VmRSS") for one in family(pid)) << 10
    seen, began_s = Watched(idle, idle, 0.0), _cpu_s(pid)
    try:
        yield seen
    finally:
        seen.peak_bytes = sum(_kilobytes(one, "VmHWM") for one in family(pid)) << 10
        seen.cpu_s = _cpu_s(pid) - began_s


def family(pid: int) -> list[int]:
    """A process and all its descendants that there are now."""
    parents: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*"):
        if words := _stat(int(path.name)):
            parents.setdefault(int(words[1]), []).append(int(path.name))
    found = [pid]
    for one in found:
        found.extend(parents.get(one, ()))
    return found


def _stat(pid: int) -> list[str]:
    """The words of a process's line after its name; none where it has ended."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kilobytes(pid: int, key: str) -> int:
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _cpu_s(pid: int) -> float:
    # Its own, and that of children it has waited for.
    ticks = sum(int(word) for one in family(pid) for word in _stat(one)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")

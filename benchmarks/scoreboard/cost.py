"""Seconds and peak memory of a rule, on more entries than the cells have."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import torch

from benchmarks.scoreboard.cells import Cell, Found
from benchmarks.scoreboard.vectors import rules

CONTRIBUTIONS, ENTRIES, WARM_ENTRIES, RUNS = 20, 1_000_000, 220_000, 2
"""A million entries: of ten thousand, memory would not show. The warm-up is just large enough for
kernels to be loaded."""

COST = "cost"
"""What the attack of such a cell is called."""


def status(key: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def forget_peak() -> None:
    """Give back what is free, and let the peak be what is left (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(cell: Cell) -> Found:
    """Least processor seconds of a few runs on one thread, and peak memory beside what is given.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    merge = rules()[cell.rule].merge
    generator = torch.Generator().manual_seed(cell.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        merge(torch.randn(CONTRIBUTIONS, WARM_ENTRIES, generator=generator), cell.declared)
        deltas_CD = torch.randn(CONTRIBUTIONS, ENTRIES, generator=generator)
        forget_peak()
        before, taken = status("VmRSS"), []
        for _ in range(RUNS):
            began = time.process_time()
            merge(deltas_CD, cell.declared)
            taken.append(time.process_time() - began)
        return {"seconds": min(taken), "peak_bytes": max(0, status("VmHWM") - before)}
    finally:
        torch.set_num_threads(threads)

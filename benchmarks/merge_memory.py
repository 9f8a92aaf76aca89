"""Peak memory of one TIES merge: ``python -m benchmarks.merge_memory ours|mergekit|peft SIDE``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.vectors import TaskVector
from benchmarks import merge_rivals as rivals
from benchmarks.merge import DENSITY, THREADS, drawn_tensors


def _status(key: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def run(who: str, side: int) -> int:
    """Bytes at the peak of the merge, inputs included, beyond what imports had taken."""
    torch.set_num_threads(THREADS)
    # A small merge first: what a library loads or compiles on first use is not the merge's.
    for size in (600, side):
        before = _status("VmRSS")
        tensors = drawn_tensors(size)
        Path("/proc/self/clear_refs").write_text("5")
        if who == "ours":
            recipe = Recipe(method="ties", params={"density": DENSITY})
            merge_task_vectors([TaskVector({"w": tensor}) for tensor in tensors], recipe)
        elif who == "mergekit":
            rivals.mergekit(tensors, "ties", density=DENSITY)
        else:
            rivals.peft_ties(tensors, DENSITY)
        peak = _status("VmHWM") - before
        del tensors
    return peak


if __name__ == "__main__":
    print(run(sys.argv[1], int(sys.argv[2])))

"""Robust rules on more than memory holds: 100 models of ten million entries, on disk.

These are 4 GB in fp32. Each rule merges them in a process of its own; its peak, interpreter and
compiled kernels included, is to stay below 2 GiB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_checkpoints
from anabranch.vectors.checkpoint import write_checkpoint
from benchmarks.harness import Row, main

MODELS, ENTRIES, QUICK_ENTRIES, MALICIOUS, THREADS = 100, 10_000_000, 200_000, 20, 2
BUDGET_BYTES = 768 << 20
MOST_BYTES = 2 << 30

RULES: dict[str, dict[str, Any]] = {
    "multi-krum": {"method": "multi_krum", "params": {"f": MALICIOUS}},
    "geometric median": {"method": "geometric_median"},
    "nnm, median": {"method": "median", "pre": [{"name": "nnm", "params": {"f": MALICIOUS}}]},
    "trimmed mean": {"method": "trimmed_mean", "params": {"trim": MALICIOUS}},
    "bulyan": {"method": "bulyan", "params": {"f": MALICIOUS}},
}


def write_models(folder: Path, entries: int) -> None:
    """A base of zeros and models around one direction, a few of them far away."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2 * entries, generator=generator)
    common = torch.randn(entries, generator=generator)
    shape = torch.Size((entries // 1000 // 4, 1000))
    layout = {f"m{part}": (torch.float32, shape) for part in range(4)}
    for model in range(-1, MODELS):
        # Another stretch of one pool: drawing a billion numbers takes longer than merging them.
        start = (model + 1) * (entries // (MODELS + 1))
        whole = common + pool[start : start + entries] if model >= 0 else torch.zeros(entries)
        if 0 <= model < MALICIOUS:
            whole *= -10 * (model + 1)
        parts = dict(zip(layout, whole.view(4, *shape), strict=True))

        def pieces(name: str, parts: dict[str, Tensor] = parts) -> Iterator[Tensor]:
            yield parts[name].flatten()

        home = folder / ("base" if model < 0 else f"model-{model:03}")
        home.mkdir()
        write_checkpoint(home, layout, pieces, 5_000_000_000)


def merge_alone(folder: Path, rule: str) -> tuple[float, int]:
    """Seconds and peak bytes of one merge in a new process."""
    command = [sys.executable, "-m", "benchmarks.robust_memory", "--merge", str(folder), rule]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return found["seconds"], found["peak_bytes"]


def merge_here(folder: Path, rule: str) -> None:
    """What that process does; prints its facts."""
    torch.set_num_threads(THREADS)
    models = sorted(folder.glob("model-*"))
    with tempfile.TemporaryDirectory(dir=folder) as out:
        started = time.perf_counter()
        merge_checkpoints(
            models,
            Recipe.model_validate(RULES[rule]),
            Path(out) / "merged",
            base=folder / "base",
            budget_bytes=BUDGET_BYTES,
        )
        seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak * 1024}))


def measure(quick: bool, only: str | None) -> Iterator[Row]:
    """A row per rule."""
    entries = QUICK_ENTRIES if quick else ENTRIES
    scenario = f"{MODELS} x {entries / 1e6:g}M fp32 on disk"
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), entries)
        for rule in RULES:
            if only and only not in rule and only not in scenario:
                continue
            seconds, peak = merge_alone(Path(folder), rule)
            detail = {"seconds": seconds}
            yield Row(
                rule, peak, None, "", scenario, f"peak bytes; {seconds:.1f} s",
                detail=detail, most={"ours": MOST_BYTES},
            )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_here(Path(sys.argv[2]), sys.argv[3])
    else:
        main("robust_memory", measure)

"""Peak memory, time and bytes of a merge of checkpoints: `python -m benchmarks.memory`.

Checkpoints hold random bfloat16 weights, written here and deleted at the end. ``--quick`` takes
12 of 60 MB; the whole takes 32 of 1 GB and 33 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from anabranch.vectors.checkpoint import write_checkpoint

WIDTH = 1024
"""Columns of every matrix."""

OURS = """
import json, sys, time
from pathlib import Path
import torch
from anabranch.aggregation import Recipe, merge_checkpoints, merge_task_vectors, plan_merge
from anabranch.vectors import TaskVector
import anabranch.aggregation.methods
folder, method, params, budget_bytes = sys.argv[1:]
status = lambda key: next(int(line.split()[1]) * 1024 for line in
    Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
models = sorted(Path(folder).glob("m*"))
recipe = Recipe(method=method, params=json.loads(params))
given = {"base": Path(folder) / "base", "budget_bytes": int(budget_bytes)}
# Compiled kernels are the interpreter's own.
small = [TaskVector({"w": torch.full((1, 1 << 21), value)}) for value in (0.5, 1.0)]
merge_task_vectors(small, recipe)
del small
before = status("VmRSS")
plan = plan_merge(models, recipe, **given)
began = time.perf_counter()
merge_checkpoints(models, recipe, Path(folder) / "out", **given)
print(json.dumps({
    "seconds": round(time.perf_counter() - began, 1),
    "peak_bytes": status("VmHWM") - before,
    "planned_bytes": plan.memory_bytes,
    "read_bytes": plan.read_bytes,
    "passes": plan.passes,
}))
"""


def write_models(folder: Path, count: int, size_bytes: int) -> None:
    """A base and ``count`` fine-tunes of it, in bfloat16."""
    rows = 4096
    tensors = max(1, size_bytes // (rows * WIDTH * 2))
    layout = {
        f"model.layers.{index}.weight": (torch.bfloat16, torch.Size((rows, WIDTH)))
        for index in range(tensors)
    }
    for number in range(count + 1):
        generator = torch.Generator().manual_seed(number)

        def pieces(_: str, generator: torch.Generator = generator) -> Iterator[torch.Tensor]:
            for _part in range(8):
                yield torch.randn(rows // 8, WIDTH, generator=generator).bfloat16()

        path = folder / ("base" if not number else f"m{number:03}")
        path.mkdir()
        write_checkpoint(path, layout, pieces, 1 << 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="12 checkpoints of 60 MB")
    parser.add_argument("--budget-mb", type=int, help="working memory; 48 when quick, else 512")
    parser.add_argument("--where", type=Path, help="folder for the checkpoints")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    given = parser.parse_args()
    count, size_bytes = (12, 60_000_000) if given.quick else (32, 1_000_000_000)
    budget_bytes = (given.budget_mb or (48 if given.quick else 512)) * 1_000_000
    folder = Path(tempfile.mkdtemp(prefix="anabranch-memory-", dir=given.where))
    results = {"models": count, "model_bytes": size_bytes, "budget_bytes": budget_bytes}
    try:
        write_models(folder, count, size_bytes)
        for method, params in (
            ("mean", {}),
            ("ties", {}),
            ("ties", {"scope": "model"}),
            ("karcher", {}),
        ):
            words = [str(folder), method, json.dumps(params), str(budget_bytes)]
            done = subprocess.run(
                [sys.executable, "-c", OURS, *words], check=True, capture_output=True, text=True
            )
            shutil.rmtree(folder / "out")
            name = " over the ".join([method, *params.values()])
            results[name] = json.loads(done.stdout)
            print(name, results[name], flush=True)
    finally:
        shutil.rmtree(folder)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

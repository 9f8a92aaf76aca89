"""Memory is the budget and one shard, whatever the number and the size of the models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.vectors.checkpoint import write_checkpoint

MODELS = 12
BUDGET_BYTES = 48 << 20
SHARD_BYTES = 16 << 20
LAYOUT = {f"layer.{i}.w": (torch.float32, torch.Size((200, 2000))) for i in range(40)}
"""64 MB a model, in many modules that kernels merge: what each of them held would add up."""

MERGE = """
import sys
from pathlib import Path
import torch
from anabranch.aggregation import Recipe, merge_checkpoints, merge_task_vectors
from anabranch.vectors import TaskVector
import anabranch.aggregation.methods
torch.set_num_threads(1)

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

folder, recipe, budget, shard = sys.argv[1:]
recipe = Recipe.model_validate_json(recipe)
models = sorted(Path(folder).glob("m*"))
# Compiled kernels are the interpreter's own.
small = [TaskVector({"w": torch.full((1, 1 << 21), value)}) for value in (0.5, 1.0)]
merge_task_vectors(small, recipe.model_copy(update={"modules": ()}))
del small
before = status("VmRSS")
merge_checkpoints(
    models, recipe, Path(folder) / "out",
    base=Path(folder) / "base", budget_bytes=int(budget), shard_bytes=int(shard),
)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    for index, name in enumerate(["base", *(f"m{i:02}" for i in range(MODELS))]):
        generator = torch.Generator().manual_seed(index)

        def rows(_: str, generator: torch.Generator = generator) -> Iterator[torch.Tensor]:
            yield torch.randn(200, 2000, generator=generator)

        (folder / name).mkdir()
        write_checkpoint(folder / name, LAYOUT, rows, 1 << 30)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "mean"},
        {"method": "ties", "params": {"scope": "model"}},
        {"method": "karcher"},
        {
            "method": "ties",
            "params": {"scope": "model"},
            "modules": [{"match": f"layer.{layer}.*", "scale": 1 + layer} for layer in range(5)],
        },
    ],
)
def test_peak_memory_is_the_budget(recipe: dict[str, Any], folder: Path) -> None:
    arguments = [folder, json.dumps(recipe), BUDGET_BYTES, SHARD_BYTES]
    done = subprocess.run(
        [sys.executable, "-c", MERGE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(folder / "out")
    assert 0 < int(done.stdout) <= BUDGET_BYTES + SHARD_BYTES

"""Guards on the tree: one namespace, typed portions, configuration free of torch."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PORTIONS = ("aggregation", "protos", "client", "coordinator", "simulation", "cli")
TORCH_FREE = (
    "anabranch.aggregation.recipe",
    "anabranch.wire.config",
    "anabranch.wire.plan",
    "anabranch.client.task",
    "anabranch.coordinator.federation",
    "anabranch.coordinator.store",
    "anabranch.simulation.scenario",
    "anabranch.cli.main",
)


@pytest.mark.parametrize("portion", PORTIONS)
def test_no_portion_hides_the_others(portion: str) -> None:
    assert not (ROOT / portion / "anabranch" / "__init__.py").exists()
    packages = [path for path in (ROOT / portion / "anabranch").iterdir() if path.is_dir()]
    names = sorted(path.name for path in packages if path.name != "__pycache__")
    untyped = [
        name for name in names if not (ROOT / portion / "anabranch" / name / "py.typed").exists()
    ]
    assert names
    assert untyped == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_configuration_loads_no_torch(module: str) -> None:
    script = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_client_loads_no_model_library_before_it_trains() -> None:
    """Flower starts a process for each message, and most of them touch no model."""
    heavy = "{'peft', 'transformers'}"
    script = f"import anabranch.client.app, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 0


def test_all_that_is_required_is_pinned() -> None:
    """What constraints.txt does not have, make install would have to resolve, to any version."""

    def name(line: str) -> str:
        return re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *itertools.chain(*project["optional-dependencies"].values()),
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(line) for line in lines if "==" in line}
    assert {name(line) for line in required} - pinned == {"anabranch"}

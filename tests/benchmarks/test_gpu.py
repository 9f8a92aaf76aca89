"""Without a GPU, the benchmark says so and fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_nothing_is_measured_without_a_device() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "no CUDA device" in run.stderr
    assert run.stdout == ""

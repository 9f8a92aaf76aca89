"""Triton's kernels where they run: on a GPU, or through the interpreter, which rounds as one does.

``tests/aggregation/kernels/gpu`` runs these tests through the interpreter, in a process of its own,
since Triton decides at import.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    runs = INTERPRETS or torch.cuda.is_available()
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            if not runs:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETS else "cuda")


@pytest.fixture(autouse=True, scope="session")
def _fused_multiply_add() -> None:
    """Let the interpreter round a·b + c once, as a GPU does; its own rounds twice."""
    if not INTERPRETS:
        return
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two fp32 numbers is exact in fp64.
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma

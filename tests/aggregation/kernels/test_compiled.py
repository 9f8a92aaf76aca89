from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from anabranch.aggregation.kernels import compiled

KERNEL = """
from anabranch.aggregation.kernels.compiled import compiled

@compiled
def twice(x):
    return 2 * x
"""


def load(path: Path) -> Any:
    """A new process's view of a kernel: its module executed anew."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.twice


def test_a_kernel_is_compiled_anew_when_what_it_calls_in_other_files_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    found = []
    for sources in (b"before", b"before", b"after"):
        monkeypatch.setattr(compiled, "_SOURCES", sources)
        twice = load(path)
        assert twice(21) == 42
        found.append((sum(twice.stats.cache_hits.values()), len(twice.stats.cache_misses)))
    assert found == [(0, 1), (1, 0), (0, 1)]

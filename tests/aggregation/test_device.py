"""Which devices a merge may be asked to run on; what runs there is tested in ``tests/gpu``."""

from __future__ import annotations

import pytest
import torch

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.engine.device import existing_device
from anabranch.vectors import TaskVector

VECTORS = [TaskVector({"w": torch.randn(30, 20)}) for _ in range(3)]


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:x", ""])
def test_a_device_that_cannot_merge_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: {name} is none that can merge; give cpu, cuda"):
        existing_device(name)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda: torch finds no CUDA device here"):
        merge_task_vectors(VECTORS, Recipe(method="ties"), device="cuda")


def test_a_device_beyond_those_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert existing_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device: cuda:2: there are 2 here, numbered from 0"):
        existing_device("cuda:2")
    with pytest.raises(ValueError, match="mean does not go entry by entry"):
        merge_task_vectors(VECTORS, Recipe(method="mean"), device="cuda")


@pytest.mark.parametrize("method", ["ties", "mean", "tsv_m"])
def test_the_cpu_is_where_they_lie(method: str) -> None:
    recipe = Recipe(method=method)
    found = merge_task_vectors(VECTORS, recipe, device="cpu").deltas["w"]
    expected = merge_task_vectors(VECTORS, recipe).deltas["w"]
    assert isinstance(found, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(found, expected)

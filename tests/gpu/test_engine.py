"""Merges whose entries are gone through on the device, beside the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.engine import merge_adapters
from anabranch.vectors import Adapter, LoraFactors, TaskVector
from anabranch.vectors.sparse import SparseTernary, ternarise
from anabranch.vectors.task_vector import LowRank

BY_ENTRIES = ["ties", "dare_ties", "median", "della", "sce"]
"""By Triton's kernels, and the last two by torch on the device."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(client: int) -> LowRank:
    # Small integers: products of any order are exact.
    b_mk, a_kn = (draw(*shape, seed=client).mul(2).round() for shape in ((70, 3), (3, 41)))
    return LowRank(b_mk, a_kn)


def ternary(client: int) -> SparseTernary:
    return ternarise(draw(70, 41, seed=client), 0.2)


FORMS: dict[str, Callable[[int], Any]] = {
    "dense": lambda client: draw(70, 41, seed=client),
    "bfloat16": lambda client: draw(70, 41, seed=client).bfloat16(),
    "low rank": low_rank,
    "sparse ternary": ternary,
}


def merged(vectors: list[TaskVector], method: str, **options: Any) -> Tensor:
    weights = [1.0, 2.0, 0.5]
    delta = merge_task_vectors(vectors, Recipe(method=method), weights=weights, **options)
    found = delta.deltas["w"]
    assert isinstance(found, Tensor)
    assert found.device.type == "cpu"
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", BY_ENTRIES)
def test_a_merge_on_the_device_is_the_merge(
    method: str, form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = [TaskVector({"w": FORMS[form](client)}) for client in range(3)]
    found = merged(vectors, method, device=device)
    in_chunks = merged(vectors, method, device=device, budget_bytes=400_000)
    assert torch.equal(found, in_chunks)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    expected = merged(vectors, method)
    if method == "sce":  # its energies are summed in another order
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def test_ties_over_the_whole_model(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [
        TaskVector({"w": draw(50, 30, seed=c), "v": 3 * draw(20, 30, seed=c + 9)}) for c in range(3)
    ]
    recipe = Recipe(method="ties", params={"scope": "model"})
    found = merge_task_vectors(vectors, recipe, device=device).deltas
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    expected = merge_task_vectors(vectors, recipe).deltas
    for module, delta in expected.items():
        merged_mn = found[module]
        assert isinstance(delta, Tensor)
        assert isinstance(merged_mn, Tensor)
        assert torch.equal(merged_mn, delta)


def test_adapters_come_back_to_where_they_were(device: torch.device) -> None:
    adapters = [
        Adapter({"w": LoraFactors(draw(4, 41, seed=c), draw(70, 4, seed=c + 9), 4.0)})
        for c in range(3)
    ]
    recipe = Recipe(method="ties")
    on_device = merge_adapters(adapters, recipe, device=device).adapter.lora["w"].delta().dense()
    plain = merge_adapters(adapters, recipe).adapter.lora["w"].delta().dense()
    assert on_device.device.type == "cpu"
    torch.testing.assert_close(on_device, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ties", "mean"])
def test_a_number_that_is_not_finite_is_refused(name: str, device: torch.device) -> None:
    broken = draw(70, 41)
    broken[3, 4] = float("nan")
    vectors = [TaskVector({"w": one.to(device)}) for one in (draw(70, 41), broken)]
    with pytest.raises(ValueError, match="contribution 1"):
        merge_task_vectors(vectors, Recipe(method=name))

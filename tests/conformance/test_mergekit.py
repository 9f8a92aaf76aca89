"""Against mergekit 0.1.5 on the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from anabranch.aggregation.methods.dare_linear import DareConfig, dare_linear
from anabranch.aggregation.methods.dare_ties import dare_ties
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC
from anabranch.aggregation.methods.ties import TIES, TiesConfig

WEIGHTS = [[1.0, 1, 1, 1], [0.1, 0.5, 2.0, 1.3]]


def oracle(tensors: list[Tensor], method: str, **parameters: Any) -> Tensor:
    """mergekit takes models, not task vectors: the base is zero and comes first."""
    return merge_tensors(
        [torch.zeros_like(tensors[0]), *tensors], method, parameters=parameters, base_index=0
    )


def ours(method: Any, tensors: list[Tensor], weights: list[float], config: Any = None) -> Tensor:
    flat_CD = torch.stack([tensor.flatten() for tensor in tensors])
    merged: Tensor = method(flat_CD, torch.tensor(weights), config)
    return merged.view_as(tensors[0])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.53, 1.0])
def test_ties(tensors: list[Tensor], weights: list[float], density: float) -> None:
    expected = oracle(tensors, "ties", weight=weights, density=density)
    found = ours(TIES, tensors, weights, TiesConfig(density=density))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_ties_keeps_ties_at_the_threshold_where_mergekit_drops_some() -> None:
    """A known disagreement: mergekit keeps exactly int(ρn), by position among equals."""
    tensors = [torch.tensor([3.0, 1.0, 1.0, 1.0])]
    theirs = oracle(tensors, "ties", weight=[1.0], density=0.5)
    assert int((theirs != 0).sum()) == 2
    found = ours(TIES, tensors, [1.0], TiesConfig(density=0.5))
    assert found.tolist() == [3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("weights", [*WEIGHTS, [1.0, -1.0, 0.5, 0.0]])
def test_task_arithmetic(tensors: list[Tensor], weights: list[float]) -> None:
    expected = oracle(tensors, "task_arithmetic", weight=weights)
    found = ours(TASK_ARITHMETIC, tensors, weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mean(tensors: list[Tensor], weights: list[float]) -> None:
    expected = merge_tensors(tensors, "linear", parameters={"weight": weights, "normalize": True})
    found = ours(MEAN, tensors, weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_with_its_masks_injected(
    tensors: list[Tensor], weights: list[float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are drawn differently everywhere. mergekit then rescales by L1 norms, which is off
    here: its tensors are divided by the density before they go in."""
    density = 0.37
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(23, 31, generator=generator) < density for _ in tensors]
    remaining = iter(masks)
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda p: next(remaining).to(p.dtype))
    expected = oracle(
        [tensor / density for tensor in tensors],
        name,
        weight=weights,
        density=density,
        rescale=False,
        normalize=True,
    )
    merge = dare_linear if name == "dare_linear" else dare_ties
    found = merge(
        torch.stack([tensor.flatten() for tensor in tensors]),
        torch.tensor(weights),
        DareConfig(density=density),
        keep_CD=torch.stack([mask.flatten() for mask in masks]),
    ).view(23, 31)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_mergekits_own_rescale_of_dare_is_another_number(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known disagreement: ‖τ‖₁/‖mτ‖₁ where the paper has 1/density."""
    mask = torch.zeros(23, 31).index_fill_(0, torch.arange(5), 1.0)
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda p: mask.to(p.dtype))
    theirs = oracle(tensors[:1], "dare_linear", weight=[1.0], density=0.25)
    factor = float(tensors[0].abs().sum() / (tensors[0] * mask).abs().sum())
    torch.testing.assert_close(theirs, tensors[0] * mask * factor)
    assert factor != pytest.approx(4.0, rel=0.01)

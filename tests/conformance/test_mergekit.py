"""Against mergekit 0.1.5 on the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from anabranch.aggregation.methods.breadcrumbs import BreadcrumbsConfig
from anabranch.aggregation.methods.dare_linear import DareConfig, dare_linear
from anabranch.aggregation.methods.dare_ties import dare_ties
from anabranch.aggregation.methods.della_linear import DellaConfig
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


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.53, 1.0])
def test_ties(tensors: list[Tensor], weights: list[float], density: float) -> None:
    expected = oracle(tensors, "ties", weight=weights, density=density)
    found = ours(TIES, tensors, weights, TiesConfig(density=density))
    assert_near(found, expected)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_on_adversarial_tensors(distinct: list[Tensor], density: float) -> None:
    weights = WEIGHTS[1][: len(distinct)]
    expected = oracle(distinct, "ties", weight=weights, density=density)
    assert_near(ours(TIES, distinct, weights, TiesConfig(density=density)), expected)


def test_nothing_is_kept_by_nobody(tensors: list[Tensor]) -> None:
    """A known disagreement: a density of 0 is a merge of nothing there, refused here."""
    for name in ("ties", "dare_linear", "dare_ties", "breadcrumbs"):
        assert not bool(oracle(tensors, name, weight=1.0, density=0.0).any())
    for config in (TiesConfig, DareConfig, BreadcrumbsConfig):
        with pytest.raises(ValueError, match="greater than 0"):
            config(density=0)
    # mergekit asks for [density − ε, density + ε] within (0, 1) only where it keeps anything.
    assert not bool(oracle(tensors, "della", weight=1.0, density=0.0).any())
    with pytest.raises(ValueError, match="greater than 0"):
        DellaConfig(density=0)


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
    assert_near(found, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mean(tensors: list[Tensor], weights: list[float]) -> None:
    expected = merge_tensors(tensors, "linear", parameters={"weight": weights, "normalize": True})
    found = ours(MEAN, tensors, weights)
    assert_near(found, expected)


def test_means_and_sums_of_adversarial_tensors(adversarial: list[Tensor]) -> None:
    weights = WEIGHTS[1][: len(adversarial)]
    found = ours(TASK_ARITHMETIC, adversarial, weights)
    assert_near(found, oracle(adversarial, "task_arithmetic", weight=weights))
    parameters = {"weight": weights, "normalize": True}
    expected = merge_tensors(adversarial, "linear", parameters=parameters)
    assert_near(ours(MEAN, adversarial, weights), expected)


def test_mergekits_mean_with_weights_that_cancel_is_infinite(tensors: list[Tensor]) -> None:
    """A known disagreement: mergekit divides by a sum of weights of zero; it is refused here."""
    parameters = {"weight": [1.0, -1.0, 0.5, -0.5], "normalize": True}
    assert bool(merge_tensors(tensors, "linear", parameters=parameters).isinf().all())
    with pytest.raises(ValueError, match="divides by their sum"):
        ours(MEAN, tensors, [1.0, -1.0, 0.5, -0.5])


@pytest.mark.parametrize("density", [0.37, 1.0])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_with_its_masks_injected(
    adversarial: list[Tensor], density: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are drawn differently everywhere. mergekit then rescales by L1 norms, which is off
    here: its tensors are divided by the density before they go in."""
    tensors, weights = adversarial, WEIGHTS[1][: len(adversarial)]
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
    assert_near(found, expected)


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

"""Breadcrumbs, DELLA and SCE against mergekit 0.1.5, and where they part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mergekit import sparsify
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods.breadcrumbs import BREADCRUMBS, BreadcrumbsConfig
from anabranch.aggregation.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from anabranch.aggregation.methods.della import DELLA
from anabranch.aggregation.methods.della_linear import (
    DELLA_LINEAR,
    DellaConfig,
    survivor_factors,
)
from anabranch.aggregation.methods.sce import SCE, SceConfig
from anabranch.aggregation.sparsify import rank_probabilities

WEIGHTS = [[1.0, 1, 1, 1], [0.1, 0.5, 2.0, 1.3]]


def oracle(tensors: list[Tensor], method: str, **parameters: Any) -> Tensor:
    """mergekit takes models, not task vectors: the base is zero and comes first."""
    return merge_tensors(
        [torch.zeros_like(tensors[0]), *tensors], method, parameters=parameters, base_index=0
    )


def ours(
    method: MergeMethod, tensors: list[Tensor], config: MethodConfig, weights: list[float] | None
) -> Tensor:
    weights_C = None if weights is None else torch.tensor(weights)
    return method(torch.stack(tensors), weights_C, config)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.2, 0.01), (0.53, 0.2), (0.3, 0.0), (0.8, 0.5), (1.0, 0.01)]
)
@pytest.mark.parametrize("method", [BREADCRUMBS, BREADCRUMBS_TIES])
def test_breadcrumbs(
    tensors: list[Tensor], weights: list[float], density: float, gamma: float, method: MergeMethod
) -> None:
    parameters = {"weight": weights, "density": density, "gamma": gamma, "normalize": True}
    found = ours(method, tensors, BreadcrumbsConfig(density=density, gamma=gamma), weights)
    assert_near(found, oracle(tensors, method.name, **parameters))


@pytest.mark.parametrize("method", [BREADCRUMBS, BREADCRUMBS_TIES])
def test_breadcrumbs_on_adversarial_tensors(distinct: list[Tensor], method: MergeMethod) -> None:
    weights = WEIGHTS[1][: len(distinct)]
    parameters = {"weight": weights, "density": 0.3, "gamma": 0.1, "normalize": True}
    found = ours(method, distinct, BreadcrumbsConfig(density=0.3, gamma=0.1), weights)
    assert_near(found, oracle(distinct, method.name, **parameters))


def test_breadcrumbs_keeps_ties_where_mergekit_drops_some() -> None:
    """A known disagreement: mergekit tells equal magnitudes apart by position."""
    ternary = [torch.tensor([1.0, -1, 1, 1, -1, 1, 1, 1, 1, 1])]
    parameters = {"weight": [1.0], "density": 0.5, "gamma": 0.2, "normalize": True}
    assert int((oracle(ternary, "breadcrumbs", **parameters) != 0).sum()) == 5
    found = ours(BREADCRUMBS, ternary, BreadcrumbsConfig(density=0.5, gamma=0.2), None)
    assert torch.equal(found, ternary[0])


def test_breadcrumbs_keeps_an_entry_where_mergekit_keeps_none() -> None:
    """A known disagreement: int(ρn) may be zero, where mergekit's own TIES keeps one."""
    row = [torch.tensor([3.0, 2.0, 1.0])]
    parameters = {"weight": [1.0], "density": 0.2, "gamma": 0.0, "normalize": True}
    assert torch.equal(oracle(row, "breadcrumbs", **parameters), torch.zeros(3))
    found = ours(BREADCRUMBS, row, BreadcrumbsConfig(density=0.2, gamma=0), None)
    assert found.tolist() == [3, 0, 0]


def assert_della_agrees(
    tensors: list[Tensor],
    weights: list[float],
    config: DellaConfig,
    method: MergeMethod,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mergekit's probabilities are ours; its draws are replaced, each divided by its own p."""
    columns = tensors[0].shape[-1]
    chunk = Chunk("q", 0, columns, torch.stack([tensor.flatten() for tensor in tensors]))
    factors_CD = survivor_factors(chunk, config)
    remaining = iter(zip(tensors, factors_CD, strict=True))

    def bernoulli(p: Tensor) -> Tensor:
        tensor, factor_D = next(remaining)
        rows = tensor.reshape(-1, columns)
        ours = rank_probabilities(rows, config.density, config.epsilon)
        # Of zeros, which it ranks by position, nothing is kept whatever their probability.
        torch.testing.assert_close(p[rows != 0], ours[rows != 0])
        return factor_D.view_as(p)

    monkeypatch.setattr(sparsify.torch, "bernoulli", bernoulli)
    parameters = {"weight": weights, "density": config.density, "epsilon": config.epsilon}
    expected = oracle(tensors, method.name, rescale=False, normalize=True, **parameters)
    found = method(torch.stack(tensors), torch.tensor(weights), config, module="q")
    assert_near(found, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.25), (0.9, 0.05)])
@pytest.mark.parametrize("method", [DELLA, DELLA_LINEAR])
@pytest.mark.parametrize("vectors", [False, True])
def test_della_with_its_masks_injected(
    tensors: list[Tensor],
    weights: list[float],
    density: float,
    epsilon: float,
    method: MergeMethod,
    vectors: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if vectors:
        tensors = [tensor.flatten() for tensor in tensors]
    config = DellaConfig(density=density, epsilon=epsilon, seed=3)
    assert_della_agrees(tensors, weights, config, method, monkeypatch)


@pytest.mark.parametrize("method", [DELLA, DELLA_LINEAR])
def test_della_on_adversarial_tensors(
    distinct: list[Tensor], method: MergeMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = WEIGHTS[1][: len(distinct)]
    config = DellaConfig(density=0.5, epsilon=0.3, seed=3)
    assert_della_agrees(distinct, weights, config, method, monkeypatch)


def test_mergekits_rescale_of_della_is_one_factor(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known disagreement: ‖τ‖₁/‖mτ‖₁ for all of a tensor, where the authors have 1/p each."""
    config = DellaConfig(density=0.5, epsilon=0.3)
    factors_CD = survivor_factors(Chunk("", 0, 31, tensors[0].view(1, -1)), config)
    mask = (factors_CD > 0).float().view(23, 31)
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda p: mask)
    theirs = oracle(tensors[:1], "della_linear", weight=[1.0], density=0.5, epsilon=0.3)
    one_factor = tensors[0].abs().sum() / (tensors[0] * mask).abs().sum()
    torch.testing.assert_close(theirs, tensors[0] * mask * one_factor)
    found = ours(DELLA_LINEAR, tensors[:1], config, None)
    assert torch.equal(found != 0, theirs != 0)
    spread = (found / theirs)[mask > 0]
    assert float(spread.max() / spread.min()) > 3  # p_keep goes from .2 to .8


def test_mergekit_ranks_equal_magnitudes_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known disagreement: of a ternary row, later entries are kept four times as often."""
    seen: list[Tensor] = []

    def bernoulli(p: Tensor) -> Tensor:
        seen.append(p)
        return torch.ones_like(p)

    monkeypatch.setattr(sparsify.torch, "bernoulli", bernoulli)
    ternary = torch.tensor([[1.0, -1, 1, -1, 1]])
    oracle([ternary], "della_linear", weight=[1.0], density=0.5, epsilon=0.3)
    torch.testing.assert_close(seen[0].sort().values, torch.tensor([[0.2, 0.35, 0.5, 0.65, 0.8]]))
    torch.testing.assert_close(rank_probabilities(ternary, 0.5, 0.3), torch.full((1, 5), 0.5))


@pytest.mark.parametrize("select", [1.0, 0.9, 0.3, 0.01])
def test_sce(tensors: list[Tensor], select: float) -> None:
    expected = oracle(tensors, "sce", select_topk=select)
    assert_near(ours(SCE, tensors, SceConfig(select=select), None), expected)


def test_sce_on_adversarial_tensors(adversarial: list[Tensor]) -> None:
    expected = oracle(adversarial, "sce", select_topk=1.0)
    assert_near(ours(SCE, adversarial, SceConfig(), None), expected)


@pytest.mark.parametrize(
    "adversarial",
    ["one zero", "half of them zero", "opposite contributions", "one far larger", "of rank two"],
    indirect=True,
)
def test_sce_selects_on_adversarial_tensors(adversarial: list[Tensor]) -> None:
    expected = oracle(adversarial, "sce", select_topk=0.4)
    assert_near(ours(SCE, adversarial, SceConfig(select=0.4), None), expected)


def test_mergekits_sce_forgets_its_weights_on_small_task_vectors(tensors: list[Tensor]) -> None:
    """A known disagreement: below a mean square of 1e-6 mergekit weighs uniformly."""
    uneven = [tensor * factor for tensor, factor in zip(tensors, (1, 2, 3, 4), strict=True)]
    small = [1e-4 * tensor for tensor in uneven]
    stack = torch.stack(small)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
    uniform = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(oracle(small, "sce"), uniform, atol=1e-9, rtol=1e-4)
    found = ours(SCE, small, SceConfig(), None)
    torch.testing.assert_close(found, 1e-4 * oracle(uneven, "sce"), atol=1e-9, rtol=1e-4)
    assert float((found - uniform).abs().max() / found.abs().max()) > 0.1


def test_mergekits_sce_shrinks_what_a_light_contribution_alone_says(tensors: list[Tensor]) -> None:
    """A known disagreement: mergekit divides by no less than 1e-6 of the weights."""
    light, heavy = tensors[0] * 1e-4, tensors[1] * (tensors[1].abs() > 1)
    theirs, found = oracle([light, heavy], "sce"), ours(SCE, [light, heavy], SceConfig(), None)
    alone = heavy == 0
    torch.testing.assert_close(found[alone], light[alone])
    assert float((theirs[alone] / light[alone]).max()) < 0.1
    torch.testing.assert_close(found[~alone], theirs[~alone], atol=1e-5, rtol=1e-5)


def test_mergekits_sce_of_equal_contributions_is_nothing(tensors: list[Tensor]) -> None:
    """A known disagreement: no variance selects nothing there, everything here."""
    same = [torch.full((2, 3), 0.5)] * 4
    assert torch.equal(oracle(same, "sce", select_topk=0.5), torch.zeros(2, 3))
    assert torch.equal(ours(SCE, same, SceConfig(select=0.5), None), same[0])

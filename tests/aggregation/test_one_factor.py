"""Adapters that share A or B: the merge of the other factor is the merge of ΔW, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

from anabranch.aggregation import Recipe, merge, merge_one_factor
from anabranch.aggregation.methods.fisher import FisherConfig, fisher
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter, LoraFactors

MakeAdapter = Callable[..., Adapter]
Factor = Literal["a", "b"]


def trained(start: Adapter, factor: Factor, seed: int) -> Adapter:
    """The start with one factor, and the head, moved."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + torch.randn(tensor.shape, generator=generator)
        for name, tensor in start.tensors(factor).items()
    }
    return start.with_tensors({**start.tensors(), **moved})


def product(factors: LoraFactors) -> torch.Tensor:
    return factors.scaling * factors.b_mr.double() @ factors.a_rn.double()


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_mean_of_one_factor_is_the_mean_of_the_products(
    make_adapter: MakeAdapter, factor: Factor, scale: float
) -> None:
    start = make_adapter(9, head=True)
    clients = [trained(start, factor, seed) for seed in range(5)]
    recipe = Recipe(method="mean", scale=scale)
    result = merge_one_factor(clients, recipe, factor, start=start)
    for name, before in start.lora.items():
        merged = result.adapter.lora[name]
        mean = torch.stack([product(client.lora[name]) for client in clients]).mean(0)
        wanted = product(before) + scale * (mean - product(before))
        assert float((product(merged) - wanted).norm()) <= 1e-6 * float(wanted.norm())
        kept = (merged.a_rn, before.a_rn) if factor == "b" else (merged.b_mr, before.b_mr)
        assert torch.equal(*kept)
        assert (merged.alpha, merged.rslora) == (before.alpha, before.rslora)
    head = torch.stack([client.dense["head.bias"] for client in clients]).mean(0)
    wanted_head = torch.lerp(start.dense["head.bias"], head, scale)
    torch.testing.assert_close(result.adapter.dense["head.bias"], wanted_head)
    assert result.report.overall_truncation == 0
    # The same ΔW by way of a stack, at five times the rank.
    stacked = merge(
        clients, recipe.model_copy(update={"refactor": Refactor(kind="stack")}), start=start
    )
    for name, factors in stacked.adapter.lora.items():
        assert factors.rank >= 20
        torch.testing.assert_close(
            product(factors), product(result.adapter.lora[name]), atol=2e-5, rtol=1e-5
        )


def test_any_method_on_entries_sees_the_entries_of_the_factor(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    clients = [trained(start, "b", seed) for seed in range(3)]
    recipe = Recipe(method="ties", params={"density": 0.3})
    result = merge_one_factor(clients, recipe, "b", start=start)
    for name, before in start.lora.items():
        changes = torch.stack([c.lora[name].b_mr - before.b_mr for c in clients]).flatten(1)
        wanted = before.b_mr.flatten() + TIES(changes, config=TiesConfig(density=0.3))
        torch.testing.assert_close(result.adapter.lora[name].b_mr.flatten(), wanted)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_fisher_weighs_the_entries_of_the_factor(make_adapter: MakeAdapter, factor: Factor) -> None:
    start = make_adapter(9, head=True)
    ends = [trained(start, factor, seed) for seed in range(3)]
    clients = [
        replace(
            end,
            importance={
                n: t.square() for n, t in trained(end, factor, 7 + c).tensors(factor).items()
            },
        )
        for c, end in enumerate(ends)
    ]
    recipe = Recipe(method="fisher", params={"normalise": "none"})
    result = merge_one_factor(clients, recipe, factor, start=start)
    for name, before in start.tensors(factor).items():
        changes_CD = torch.stack([c.tensors(factor)[name] - before for c in clients]).flatten(1)
        squares_CD = torch.stack([c.importance[name] for c in clients]).flatten(1)
        merged_D = fisher(changes_CD, torch.ones(3), FisherConfig(), importances_CD=squares_CD)
        wanted = before.flatten() + merged_D
        torch.testing.assert_close(result.adapter.tensors()[name].flatten(), wanted)
    mean = merge_one_factor(ends, Recipe(method="mean"), factor, start=start)
    assert mean.adapter.hash() != result.adapter.hash()
    # An importance of ΔW says nothing of the entries of one factor.
    module = f"deep.query.lora_{factor.upper()}"
    of_products = replace(ends[0], importance={name: f.delta() for name, f in start.lora.items()})
    with pytest.raises(ValueError, match=f"site-b ships no Fisher of module {module}"):
        merge_one_factor([clients[0], of_products], recipe, factor, start=start,
                         names=["site-a", "site-b"])  # fmt: skip


def test_what_is_not_shared_is_refused_by_name(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    mine, other = trained(start, "b", 0), trained(start, "a", 1)
    with pytest.raises(ValueError, match=r"site-b: module deep\.query does not share A"):
        merge_one_factor([mine, other], Recipe(method="mean"), "b", start=start,
                         names=["site-a", "site-b"])  # fmt: skip
    scaled = replace(mine, lora={n: replace(f, alpha=1.0) for n, f in mine.lora.items()})
    with pytest.raises(ValueError, match="does not share A and its scaling"):
        merge_one_factor([scaled], Recipe(method="mean"), "b", start=start)
    fewer = replace(mine, lora={"deep.query": mine.lora["deep.query"]})
    with pytest.raises(ValueError, match=r"adapt different modules, such as deep\.value"):
        merge_one_factor([fewer], Recipe(method="mean"), "b", start=start)

"""Contributions of several ranks: truncated starts, task vectors against them, padded factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge
from anabranch.aggregation.engine.truncate import truncate
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter, LoraFactors, seeded_start

MakeAdapter = Callable[..., Adapter]
RANKS = (1, 2, 6, 6)


def product(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.b_mr.double() @ factors.a_rn.double()


def best(matrix_mn: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix_mn, full_matrices=False)
    return u[:, :rank] @ s[:rank].diag() @ v[:rank]


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("rslora", [False, True])
def test_a_seeded_start_at_a_lower_rank_is_the_leading_part_of_the_whole(
    make_adapter: MakeAdapter, rslora: bool
) -> None:
    whole = make_adapter(0, rank=6, rslora=rslora)
    for rank in (1, 3, 6, 9):
        low = seeded_start(whole.leading(rank), 5)
        assert low.hash() == seeded_start(whole, 5).leading(rank).hash()
        for name, factors in low.lora.items():
            assert factors.rank == min(rank, 6)
            assert factors.scaling == pytest.approx(whole.lora[name].scaling, rel=1e-15)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_truncation_is_the_best_one_and_lies_near_the_leading_factors(
    make_adapter: MakeAdapter, rslora: bool
) -> None:
    whole = make_adapter(0, rank=6, rslora=rslora)
    low = truncate(whole, 2)
    for name, factors in low.lora.items():
        assert factors.rank == 2
        assert relative(product(factors), best(product(whole.lora[name]), 2)) < 1e-6
    assert truncate(whole, 6).hash() == whole.hash()
    # What stands in rank 2 already and is balanced comes back as it is, in the same basis.
    filled = {
        name: replace(
            whole.lora[name],
            a_rn=torch.cat([factors.a_rn, torch.zeros_like(whole.lora[name].a_rn[2:])]),
            b_mr=torch.cat([factors.b_mr, torch.zeros_like(whole.lora[name].b_mr[:, 2:])], dim=1),
        )
        for name, factors in low.lora.items()
    }
    again = truncate(replace(whole, lora=filled), 2)
    for name, tensor in low.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, atol=1e-5, rtol=1e-5)


def trained_at(start: Adapter, rank: int, seed: int) -> tuple[Adapter, Adapter]:
    """A client's own start and where it came from there."""
    own = truncate(start, rank)
    generator = torch.Generator().manual_seed(seed)
    end = own.with_tensors(
        {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in own.tensors().items()
        }
    )
    return own, end


@pytest.mark.parametrize("kind", ["svd", "stack"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_what_each_added_to_its_own_start_is_merged(
    make_adapter: MakeAdapter, kind: str, scale: float
) -> None:
    start = make_adapter(9, rank=6, head=True)
    pairs = [trained_at(start, rank, seed) for seed, rank in enumerate(RANKS)]
    starts, ends = [own for own, _ in pairs], [end for _, end in pairs]
    recipe = Recipe(method="mean", scale=scale, refactor=Refactor.model_validate({"kind": kind}))
    result = merge(ends, recipe, start=start, starts=starts)
    for name, merged in result.adapter.lora.items():
        added = [product(end.lora[name]) - product(own.lora[name]) for own, end in pairs]
        exact = product(start.lora[name]) + scale * torch.stack(added).mean(0)
        if kind == "svd":
            assert merged.rank == 6
            exact = best(exact, 6)
        assert relative(product(merged), exact) < 1e-5
    head = torch.stack([end.dense["head.bias"] for end in ends]).mean(0)
    wanted = torch.lerp(start.dense["head.bias"], head, scale)
    torch.testing.assert_close(result.adapter.dense["head.bias"], wanted)
    # An entry method sees the same task vectors.
    ones = merge(ends, Recipe(method="median"), start=start, starts=starts)
    for name, merged in ones.adapter.lora.items():
        added = [product(end.lora[name]) - product(own.lora[name]) for own, end in pairs]
        middle = torch.stack(added).quantile(0.5, dim=0)
        assert relative(product(merged), best(product(start.lora[name]) + middle, 6)) < 1e-3


def test_clients_of_low_rank_leave_the_adapter_its_rank(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9, rank=6)
    own, end = trained_at(start, 2, 0)
    result = merge([end], Recipe(method="ties"), start=start, starts=[own])
    assert {factors.rank for factors in result.adapter.lora.values()} == {6}


def test_hetlora_pads_and_weighs_by_norm(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9, rank=6)
    ends = [
        make_adapter(seed, rank=rank, alpha=4 / 3 * rank) for seed, rank in enumerate((1, 2, 4))
    ]
    result = merge(ends, Recipe(method="hetlora", weights=(1.0, 2.0, 1.0)), start=start)
    for name, merged in result.adapter.lora.items():
        norms = [
            w * float(product(end.lora[name]).norm())
            for w, end in zip((1, 2, 1), ends, strict=True)
        ]
        a_rn, b_mr = torch.zeros(4, merged.a_rn.shape[1]), torch.zeros(len(merged.b_mr), 4)
        for norm, end in zip(norms, ends, strict=True):
            factors = end.lora[name]
            a_rn[: factors.rank] += norm / sum(norms) * factors.a_rn
            b_mr[:, : factors.rank] += norm / sum(norms) * factors.b_mr
        torch.testing.assert_close(merged.a_rn[:4], a_rn)
        torch.testing.assert_close(merged.b_mr[:, :4], b_mr)
        # Nobody trained the last two directions.
        torch.testing.assert_close(merged.a_rn[4:], start.lora[name].a_rn[4:])
        torch.testing.assert_close(merged.b_mr[:, 4:], start.lora[name].b_mr[:, 4:])
    alone = merge(ends, Recipe(method="hetlora"))
    assert {factors.rank for factors in alone.adapter.lora.values()} == {4}


def test_hetlora_of_one_rank_and_norm_is_fedit(make_adapter: MakeAdapter) -> None:
    one = make_adapter(0)
    turned = {
        name: LoraFactors(f.a_rn.flip(0), f.b_mr.flip(1), f.alpha) for name, f in one.lora.items()
    }
    pair = [one, replace(one, lora=turned)]
    het, fed = (merge(pair, Recipe(method=name)).adapter.tensors() for name in ("hetlora", "fedit"))
    for name, tensor in fed.items():
        torch.testing.assert_close(het[name], tensor)
    zeros = [seeded_start(adapter, 1) for adapter in pair]
    assert not merge(zeros, Recipe(method="hetlora")).adapter.tensors()["deep.query.lora_B"].any()


def test_hetlora_refuses_other_scalings_and_ranks_above_the_start_s(
    make_adapter: MakeAdapter,
) -> None:
    recipe = Recipe(method="hetlora")
    with pytest.raises(ValueError, match=r"contribution 1 scales by 4.0, .* by 2.0"):
        merge([make_adapter(0), make_adapter(1, rank=2)], recipe, start=make_adapter(9))
    with pytest.raises(ValueError, match=r"contribution 0 has rank 4, the start has rank 2"):
        merge([make_adapter(0)], recipe, start=make_adapter(9, rank=2))

"""FLoRA and FedEx-LoRA: a trained and a frozen part that add up to the exact merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from anabranch.aggregation import Recipe
from anabranch.aggregation.engine.keep import Rest, compact, merge_keeping
from anabranch.vectors import Adapter, LoraFactors, LowRank, seeded_start
from anabranch.vectors.frozen import from_tensors, join, most_ranks, split, whole_layout

MakeAdapter = Callable[..., Adapter]


def product(factors: LoraFactors) -> torch.Tensor:
    return factors.scaling * factors.b_mr.double() @ factors.a_rn.double()


@pytest.mark.parametrize("rest", ["fedex", "flora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_round_after_round_trained_and_frozen_add_up_to_the_mean(
    make_adapter: MakeAdapter, rest: Rest, rslora: bool
) -> None:
    template = make_adapter(0, rank=2, head=True, rslora=rslora)
    trained, frozen = seeded_start(template, 1), dict[str, LowRank]()
    whole = {name: torch.zeros(m, n).double() for name, (m, n) in SHAPES.items()}
    for number in range(8):
        ends = [make_adapter(10 * number + seed, near=trained) for seed in range(4)]
        fresh = seeded_start(template, 100 + number)
        kept = merge_keeping(
            ends, Recipe(method="mean"), rest, start=trained, fresh=fresh, frozen=frozen
        )
        for name in whole:
            changes = [product(e.lora[name]) - product(trained.lora[name]) for e in ends]
            whole[name] += torch.stack(changes).mean(0)
            both = product(kept.trained.lora[name]) + kept.frozen[name].dense().double()
            assert float((both - whole[name]).norm()) <= 2e-6 * float(whole[name].norm())
            assert kept.frozen[name].rank <= min(SHAPES[name])
            if rest == "fedex":
                mean_a = torch.stack([end.lora[name].a_rn for end in ends]).mean(0)
                torch.testing.assert_close(kept.trained.lora[name].a_rn, mean_a)
            if rest == "flora":
                assert torch.equal(kept.trained.lora[name].a_rn, fresh.lora[name].a_rn)
                assert not kept.trained.lora[name].b_mr.any()
        head = torch.stack([end.dense["head.bias"] for end in ends]).mean(0)
        torch.testing.assert_close(kept.trained.dense["head.bias"], head)
        trained, frozen = kept.trained, dict(kept.frozen)
    # The matrices were filled on the way: growth ends there.
    assert max(part.rank for part in frozen.values()) == 24


SHAPES = {"deep.query": (40, 24), "deep.value": (24, 70)}


def test_flora_takes_mixed_ranks(make_adapter: MakeAdapter) -> None:
    fresh = seeded_start(make_adapter(0, rank=4), 3)
    starts = [fresh.leading(rank) for rank in (1, 2, 4)]
    ends = [make_adapter(seed, near=start) for seed, start in enumerate(starts)]
    kept = merge_keeping(
        ends, Recipe(method="mean"), "flora", start=fresh, starts=starts, fresh=fresh, frozen={}
    )
    for name, part in kept.frozen.items():
        wanted = torch.stack([product(end.lora[name]) for end in ends]).mean(0)
        assert float((part.dense() - wanted).norm()) <= 1e-6 * float(wanted.norm())
        assert part.rank <= 7


def test_a_product_is_brought_to_its_own_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 3, generator=generator), torch.randn(3, 5, generator=generator)
    wide = LowRank(torch.cat([b, b, -b, b], dim=1), torch.cat([a, a, a, a]))
    small = compact(wide)
    assert small.rank == 3
    torch.testing.assert_close(small.dense(), 2 * b @ a, atol=1e-5, rtol=1e-5)
    assert compact(LowRank(b * 0, a)).rank == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_joined_splits_into_the_same_parts(make_adapter: MakeAdapter, rslora: bool) -> None:
    trained = make_adapter(0, rank=2, head=True, rslora=rslora)
    frozen = {"deep.query": make_adapter(1, rank=5).lora["deep.query"].delta()}
    whole = join(trained, frozen)
    again, beside = split(whole, trained)
    assert again.hash() == trained.hash()
    assert list(beside) == ["deep.query"]
    torch.testing.assert_close(beside["deep.query"].b_mk, frozen["deep.query"].b_mk)
    wanted = product(trained.lora["deep.query"]) + frozen["deep.query"].dense()
    torch.testing.assert_close(product(whole.lora["deep.query"]), wanted, atol=1e-4, rtol=1e-4)
    assert from_tensors(trained, whole.tensors()).hash() == whole.hash()


def test_a_layout_grows_only_as_far_as_a_matrix_has_ranks(make_adapter: MakeAdapter) -> None:
    trained = make_adapter(0, rank=2)
    plain = {name: tuple(tensor.shape) for name, tensor in trained.tensors().items()}
    assert most_ranks(trained) == {"deep.query": 26, "deep.value": 26}

    def claimed(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        """Whether such shapes of one module are taken up."""
        shapes = {**plain, "deep.query.lora_A": a, "deep.query.lora_B": b}
        layout = whole_layout(trained, shapes)
        assert layout in (plain, shapes)
        return layout == shapes

    assert claimed((26, 24), (40, 26))
    for a, b in (
        ((27, 24), (40, 27)),
        ((1, 24), (40, 1)),
        ((5, 24), (40, 6)),
        ((5, 23), (40, 5)),
        ((5,), (40, 5)),
    ):
        assert not claimed(a, b), (a, b)
    assert whole_layout(trained, {}) == plain

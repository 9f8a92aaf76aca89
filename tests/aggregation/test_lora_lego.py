"""LoRA-LEGO and the clustering under it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge
from anabranch.aggregation.k_means import k_means
from anabranch.aggregation.methods.lora_lego import LoraLegoConfig, lora_lego
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter, LowRank

MakeAdapter = Callable[..., Adapter]


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def planted(clusters: int, each: int, spread: float) -> tuple[Tensor, Tensor]:
    """Points around centres far apart, in shuffled order, and the cluster each was drawn from."""
    centres = 10 * draw(clusters, 8, seed=0)
    owner = torch.arange(clusters).repeat(each)
    owner = owner[torch.randperm(len(owner), generator=torch.Generator().manual_seed(1))]
    return centres[owner] + spread * draw(len(owner), 8, seed=2), owner


def inertia(points: Tensor, weights: Tensor, labels: Tensor) -> float:
    total = 0.0
    for label in labels.unique():
        mine, w = points[labels == label], weights[labels == label]
        centre = (w[:, None] * mine).sum(0) / w.sum()
        total += float(((mine - centre).square().sum(1) * w).sum())
    return total


def test_k_means_finds_clusters_that_are_there() -> None:
    points, owner = planted(6, 5, 0.1)
    labels = k_means(points, torch.ones(30).double(), 6, seed=0, restarts=10)
    pairs = set(zip(labels.tolist(), owner.tolist(), strict=True))
    assert len(pairs) == 6


def test_k_means_gains_by_restarts_and_repeats_for_a_seed() -> None:
    points, weights = draw(60, 5, seed=3), torch.ones(60).double()
    found = [
        inertia(points, weights, k_means(points, weights, 8, seed=0, restarts=restarts))
        for restarts in (1, 4, 20)
    ]
    assert found[0] >= found[1] >= found[2]
    assert found[0] > found[2]
    one = k_means(points, weights, 8, seed=7, restarts=3)
    assert torch.equal(one, k_means(points, weights, 8, seed=7, restarts=3))


def test_k_means_ends_where_every_point_is_with_its_nearest_mean() -> None:
    points, weights = draw(40, 4, seed=3), draw(40, seed=4).abs() + 0.1
    labels = k_means(points, weights, 5, seed=0, restarts=1)
    means = torch.stack(
        [
            (weights[labels == c, None] * points[labels == c]).sum(0) / weights[labels == c].sum()
            for c in range(5)
        ]
    )
    assert torch.equal(torch.cdist(points, means).argmin(1), labels)


def test_k_means_weighs_its_points() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0]]).double()
    heavy = torch.tensor([1.0, 1e4, 1.0]).double()
    # One of the three pairs shares a cluster: the one that costs least.
    assert k_means(points, heavy, 2, seed=0, restarts=10).unique(return_counts=True)[1].max() == 2
    far = torch.tensor([[0.0], [4.0], [9.0]]).double()
    light = torch.tensor([1.0, 1.0, 1e-3]).double()
    labels = k_means(far, light, 2, seed=0, restarts=10)
    assert labels[1] == labels[2] != labels[0]


def test_k_means_makes_no_more_clusters_than_points_differ() -> None:
    same = draw(1, 4, seed=0).expand(9, -1)
    assert k_means(same, torch.ones(9).double(), 3, seed=0, restarts=2).tolist() == [0] * 9
    two = draw(2, 4, seed=0)
    assert k_means(two, torch.ones(2).double(), 5, seed=0, restarts=2).tolist() == [0, 1]


def bricks(noise: float) -> tuple[list[LowRank], list[Tensor]]:
    """Three adapters made of the same three units, in another order each, and those units."""
    units = 3 * draw(3, 20 + 30, seed=5)
    deltas, seen = [], []
    for client, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 0)]):
        mine = units[list(order)] + noise * draw(len(order), 50, seed=10 + client)
        deltas.append(LowRank(mine[:, 20:].T, mine[:, :20]))
        seen += [(index, unit) for index, unit in zip(order, mine, strict=True)]
    members = [torch.stack([unit for index, unit in seen if index == c]) for c in range(3)]
    return deltas, members


@pytest.mark.parametrize(("strength", "reference"), [("adapter", 8 / 3), ("sum", 8)])
def test_it_is_the_formula_on_known_clusters(strength: str, reference: float) -> None:
    deltas, members = bricks(0.3)
    expected = torch.zeros(30, 20).double()
    for cluster in members:
        centroid = cluster.mean(0)
        centroid = centroid * cluster.norm(dim=1).mean() / centroid.norm()
        expected += torch.outer(centroid[20:], centroid[:20]) * (reference / 3) ** 0.5
    found = lora_lego(deltas, torch.ones(3), LoraLegoConfig(strength=strength))  # type: ignore[arg-type]
    assert isinstance(found, LowRank)
    assert found.rank == 3
    torch.testing.assert_close(found.dense().double(), expected, atol=1e-5, rtol=1e-5)


def test_weights_move_the_centroids() -> None:
    a_kn, b_mk = draw(1, 20, seed=0), draw(30, 1, seed=1)
    pair = [LowRank(b_mk, a_kn), LowRank(b_mk, a_kn + 0.2 * draw(1, 20, seed=2))]
    found = lora_lego(pair, torch.tensor([3.0, 1.0]).double(), LoraLegoConfig())
    units = torch.stack([torch.cat([d.a_kn[0], d.b_mk[:, 0]]) for d in pair])
    shares = torch.tensor([0.75, 0.25]).double()
    centroid = shares @ units
    centroid = centroid * (shares @ units.norm(dim=1)) / centroid.norm()
    expected = torch.outer(centroid[20:], centroid[:20]).float()
    torch.testing.assert_close(found.dense(), expected)  # type: ignore[union-attr]


def test_opposite_units_cancel_without_dividing_by_zero() -> None:
    one = LowRank(draw(6, 1, seed=0), draw(1, 5, seed=1))
    other = LowRank(-one.b_mk, -one.a_kn)
    merged = lora_lego([one, other], torch.ones(2), LoraLegoConfig())
    assert torch.equal(merged.dense(), torch.zeros(6, 5))  # type: ignore[union-attr]


def product(adapter: Adapter, name: str) -> Tensor:
    return adapter.lora[name].delta().dense().double()


def test_equal_adapters_merge_to_themselves(make_adapter: MakeAdapter) -> None:
    adapter, start = make_adapter(1), make_adapter(9)
    merged = merge([adapter] * 4, Recipe(method="lora_lego"), start=start).adapter
    for name in adapter.lora:
        torch.testing.assert_close(
            product(merged, name), product(adapter, name), atol=1e-4, rtol=1e-4
        )


def test_whole_adapters_are_merged_and_the_scale_is_a_step_from_the_start(
    make_adapter: MakeAdapter,
) -> None:
    start = make_adapter(9)
    adapters = [make_adapter(seed, near=start) for seed in range(3)]
    adapters[1] = replace(
        adapters[1],
        lora={
            name: replace(f, a_rn=f.a_rn.flip(0), b_mr=f.b_mr.flip(1))
            for name, f in adapters[1].lora.items()
        },
    )
    recipe = Recipe(
        method="lora_lego", params={"seed": 3}, scale=0.5, refactor=Refactor(kind="stack")
    )
    merged = merge(adapters, recipe, start=start).adapter
    for name in start.lora:
        whole = lora_lego(
            [adapter.lora[name].delta() for adapter in adapters],
            torch.ones(3),
            LoraLegoConfig(seed=3),
        )
        expected = (product(start, name) + whole.dense()) / 2  # type: ignore[union-attr]
        torch.testing.assert_close(product(merged, name), expected, atol=1e-4, rtol=1e-4)
        # Units that training moved little find each other again, whatever their order.
        near = product(start, name)
        assert float((whole.dense() - near).norm() / near.norm()) < 0.2  # type: ignore[union-attr]

"""Sparse ternary task vectors merge to what the same merge makes of what they decode to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.engine import stream
from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.methods import BUILT_IN
from anabranch.vectors import TaskVector
from anabranch.vectors.sparse import SparseTernary, nothing, ternarise
from anabranch.vectors.task_vector import held

WEIGHTS = [1.0, 2, 0, 0.5, 3, 1.5]

RECIPES: dict[str, dict[str, Any]] = {
    "mean": {},
    "task_arithmetic": {},
    "ties": {"density": 0.03},
    "sign_vote": {},
    "multi_krum": {"f": 0},
}
"""Methods that go sparse; TIES at a density below that of the updates."""

NEEDS: dict[str, dict[str, Any]] = {
    **RECIPES,
    "bulyan": {"f": 0},
    "fltrust": {"root": "contribution 0"},
}


def updates(count: int, *shape: int, density: float = 0.1) -> list[SparseTernary]:
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(*shape, generator=generator)
    return [
        ternarise((1 + c) * (common + torch.randn(*shape, generator=generator)), density)
        for c in range(count)
    ]


def merged(
    found: Sequence[SparseTernary | Tensor],
    name: str,
    weights: Sequence[float] | None = None,
    params: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    recipe = Recipe(method=name, params=RECIPES.get(name, {}) if params is None else params)
    vectors = [TaskVector({"w": one}) for one in found]
    delta = merge_task_vectors(vectors, recipe, weights=weights, **options).deltas["w"]
    assert isinstance(delta, Tensor)
    return delta


def dense(found: Sequence[SparseTernary]) -> list[Tensor]:
    return [update.dense() for update in found]


@pytest.fixture(params=["torch", "kernel"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1 if request.param == "kernel" else 1 << 60)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("shape", [(1,), (2047,), (2048,), (2049,), (83, 211), (9, 3, 40)])
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("name", ["mean", "task_arithmetic", "ties"])
def test_they_merge_to_what_they_decode_to(name: str, shape: tuple[int, ...], count: int) -> None:
    found, weights = updates(count, *shape), WEIGHTS[:count]
    result = merged(found, name, weights)
    assert bool(result.any())
    assert torch.equal(result, merged(dense(found), name, weights))


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[SparseTernary], list[float]]:
    shape = torch.Size(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2)))
    positions = st.sets(st.integers(0, shape.numel() - 1))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        kept = sorted(draw(positions))
        signs = draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept)))
        scale = draw(st.sampled_from([0.25, 1.0, 3.0])) if kept else 0.0
        positions_k = torch.tensor(kept, dtype=torch.int64)
        found.append(
            SparseTernary(positions_k, torch.tensor(signs, dtype=torch.bool), scale, shape)
        )
    weights = draw(st.lists(st.integers(1, 4), min_size=len(found), max_size=len(found)))
    return found, [float(weight) for weight in weights]


@pytest.mark.parametrize("smallest", [1, 1 << 60])
@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), shuffle=st.randoms(use_true_random=False))
def test_any_cohort_merges_to_what_it_decodes_to_in_any_order(
    smallest: int, cohort: tuple[list[SparseTernary], list[float]], shuffle: Any
) -> None:
    """No non-zeros, all of them, one contribution: whatever there is."""
    found, weights = cohort
    order = list(range(len(found)))
    shuffle.shuffle(order)
    again, again_weights = [found[i] for i in order], [weights[i] for i in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_rows, "SMALLEST", smallest)
        for name in ("mean", "task_arithmetic", "ties"):
            result = merged(found, name, weights)
            assert torch.equal(result, merged(dense(found), name, weights))
            torch.testing.assert_close(merged(again, name, again_weights), result)


@pytest.mark.parametrize("method", BUILT_IN, ids=lambda method: str(method.name))
def test_every_method_takes_them(method: Any) -> None:
    """Those that cannot go sparse see their rows, however the budget cuts them."""
    if method.needs_importance:
        pytest.skip("reads what no update brings in this form")
    found = updates(2 if method.name == "slerp" else 3, 70, 12, density=0.3)
    params = NEEDS.get(method.name, {})
    expected = merged(dense(found), method.name, params=params)
    assert torch.equal(merged(found, method.name, params=params), expected)
    budget_bytes = 30_000
    if method.whole_tensors:
        # It ranks one contribution's whole tensor, and says what that takes.
        with pytest.raises(ValueError, match="allow at least 107520"):
            merged(found, method.name, params=params, budget_bytes=budget_bytes)
        budget_bytes = 107_520
    small = merged(found, method.name, params=params, budget_bytes=budget_bytes)
    assert torch.equal(small, expected)


@pytest.mark.usefixtures("_path")
def test_trimming_over_the_model_drops_the_modules_of_small_scale() -> None:
    """A module is kept or dropped whole, since all it holds is of one magnitude."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (40, 30), "small": (50,)}
    sizes = {"large": 5.0, "small": 1.0}
    vectors = [
        TaskVector(
            {
                name: ternarise(sizes[name] * torch.randn(shape, generator=generator), 0.5)
                for name, shape in shapes.items()
            }
        )
        for _ in range(3)
    ]
    recipe = Recipe(method="ties", params={"density": 0.3, "scope": "model"})
    decoded = [TaskVector({name: held(d) for name, d in one.items()}) for one in vectors]
    result, expected = (merge_task_vectors(these, recipe).deltas for these in (vectors, decoded))
    for name in shapes:
        mine, theirs = result[name], expected[name]
        assert isinstance(mine, Tensor)
        assert isinstance(theirs, Tensor)
        assert torch.equal(mine, theirs)
        assert bool(mine.any()) == (name == "large")


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("name", ["mean", "ties", "median"])
def test_a_module_that_is_sparse_for_some_is_merged_as_entries(name: str) -> None:
    found = updates(3, 60, 40)
    mixed = [found[0], found[1].dense(), found[2]]
    assert torch.equal(merged(mixed, name, WEIGHTS[:3]), merged(dense(found), name, WEIGHTS[:3]))


@pytest.mark.parametrize("name", RECIPES)
def test_large_ones_are_never_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = updates(3, 900, 800, density=0.5)
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1 << 20)
    expected = merged(dense(found), name)

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(SparseTernary, "read", decode)
    assert torch.equal(merged(found, name), expected)


@pytest.mark.usefixtures("_path")
def test_updates_of_nothing_and_of_everything() -> None:
    empty = nothing(torch.Size([300]))
    everything = ternarise(torch.randn(300, generator=torch.Generator().manual_seed(0)), 1.0)
    for name in ("mean", "task_arithmetic", "ties"):
        assert torch.equal(merged([empty] * 3, name), torch.zeros(300))
    assert torch.equal(merged([empty, everything], "ties"), everything.dense())
    opposite = SparseTernary(
        everything.positions_k, ~everything.negative_k, everything.scale, everything.shape
    )
    assert torch.equal(merged([everything, opposite], "mean"), torch.zeros(300))
    elected = merged([everything, opposite], "ties")
    assert torch.equal(elected, torch.full((300,), everything.scale))


def test_a_sum_beyond_fp32_is_what_it_is_for_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1)
    most = torch.finfo(torch.float32).max
    huge = [SparseTernary(torch.tensor([1]), torch.tensor([False]), most, torch.Size([3]))] * 2
    result = stream.weighted_sum(huge, [1.0, 1.0])
    assert isinstance(result, Tensor)
    assert result.tolist() == [0.0, float("inf"), 0.0]

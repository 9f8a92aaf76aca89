"""Compositions: those with names of their own are those methods, the rest what their parts say."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.composition import (
    COMBINATIONS,
    CONSENSUSES,
    NAMED,
    SPARSIFIERS,
    built,
    composed,
)
from anabranch.aggregation.registry import resolve
from anabranch.vectors import TaskVector

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
EVERY = [
    tuple(part for part in parts if part)
    for parts in product(["", *SPARSIFIERS], ["", *CONSENSUSES], COMBINATIONS)
]


def deltas() -> Tensor:
    drawn_CD = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(3))
    drawn_CD[:, 3] = drawn_CD[:, 3].round()
    drawn_CD[1, :, 4] = 0
    drawn_CD[:, 7, 7] = torch.tensor([1.0, -0.5, 0, 0, 0])  # a sum of zero by weight
    return drawn_CD


@pytest.mark.parametrize("parts", NAMED, ids="+".join)
def test_one_with_a_name_of_its_own_is_that_method(parts: tuple[str, ...]) -> None:
    named = NAMED[parts]
    assert composed(" + ".join(parts)) is named
    config = {"density": 0.4} if "density" in named.config.model_fields else {}
    from_parts = built(parts)
    assert sorted(from_parts.config.model_fields) == sorted(named.config.model_fields)
    expected = named(deltas(), WEIGHTS, named.config.model_validate(config), module="m")
    found = from_parts(deltas(), WEIGHTS, from_parts.config.model_validate(config), module="m")
    assert torch.equal(found, expected)
    assert bool(found.any())


def test_parts_do_what_they_say() -> None:
    first_CD = deltas().flatten(1)
    weights = WEIGHTS.tolist()
    found = {end: composed(f"sign + {end}")(first_CD, WEIGHTS) for end in COMBINATIONS}
    for entry, column in enumerate(first_CD.T.double().tolist()):
        total = sum(w * d for w, d in zip(weights, column, strict=True))
        sign = 1 if total >= -1e-12 else -1
        agreeing = [(w, d) for w, d in zip(weights, column, strict=True) if d * sign > 0]
        kept = sum(w * d for w, d in agreeing)
        share = sum(w for w, _ in agreeing) or 1.0
        for end, value in (
            ("sum", kept),
            ("mean", kept / sum(weights)),
            ("disjoint_mean", kept / share),
        ):
            assert found[end][entry].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("parts", [parts for parts in EVERY if len(parts) > 1], ids="+".join)
def test_recipes_merge_by_any_in_any_budget(parts: tuple[str, ...]) -> None:
    recipe = Recipe(
        method="+".join(parts),
        params={"density": 0.4} if parts[0] in SPARSIFIERS else {},
        weights=tuple(WEIGHTS.tolist()),
    )
    method, config = resolve(recipe)
    expected = method(deltas(), WEIGHTS, config, module="m")
    vectors = [TaskVector({"m": delta}) for delta in deltas()]
    for budget_bytes in (1 << 30, 20_000):
        merged = merge_task_vectors(vectors, recipe, budget_bytes=budget_bytes)
        assert torch.equal(merged.deltas["m"], expected)
    assert bool(expected.isfinite().all())
    assert bool(expected.any())


@pytest.mark.parametrize(
    "method",
    ["trim + sign", "sign + trim + mean", "mean + sum", "dare + dare + mean", "+", "a + b"],
)
def test_parts_out_of_order_are_refused(method: str) -> None:
    with pytest.raises(
        ValueError, match=r"^recipe: method: .* is no composition; give one of trim"
    ):
        resolve(Recipe(method=method))


def test_parameters_are_those_of_the_parts() -> None:
    recipe = Recipe(method="della + mask + sum", params={"epsilon": 0.1, "votes": 3})
    _, config = resolve(recipe)
    assert (config.epsilon, config.votes) == (0.1, 3)  # type: ignore[attr-defined]
    for params, key in (({"gamma": 0.1}, "gamma"), ({"density": 2}, "density")):
        with pytest.raises(ValueError, match=rf"^recipe: params\.{key}: "):
            resolve(recipe.model_copy(update={"params": params}))

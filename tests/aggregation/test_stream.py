"""The streaming engine gives what the method gives on whole tensors, whatever the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import chunk
from anabranch.aggregation.engine.rows import ROW_BLOCK, WORKING_COPIES
from anabranch.aggregation.engine.stream import merge_task_vectors
from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.recipe import Recipe
from anabranch.vectors import Delta, LowRank, TaskVector
from anabranch.vectors.counter import uniform

COUNT = 5
ALONE = [m for m in BUILT_IN if not m.needs_importance]
"""Methods that are given nothing but task vectors; test_fisher.py has the other."""
NAMES = sorted(method.name for method in ALONE)
NEEDS: dict[str, dict[str, Any]] = {
    "bulyan": {"f": 0},
    "fltrust": {"root": "contribution 0"},
    "crfl": {"sigma": 0},
}
"""Without these, five contributions cannot be merged, or noise goes by the name of the module."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        m.name: (m.name, NEEDS.get(m.name, {}))
        for m in ALONE
        if m.matrices is None and not m.factors
    },
    "ties over the model": ("ties", {"scope": "model", "density": 0.3}),
    "breadcrumbs over the model": ("breadcrumbs", {"scope": "model", "gamma": 0.1}),
    "breadcrumbs_ties over the model": ("breadcrumbs_ties", {"scope": "model", "gamma": 0.1}),
    "pcb per tensor": ("pcb", {"scope": "tensor", "ratio": 0.4}),
    "dnc that looks at few": ("dnc", {"size": 200, "iterations": 2}),
    "sce that selects": ("sce", {"select": 0.3}),
    "sce that keeps the rest": ("sce", {"select": 0.3, "unselected": "keep"}),
    **{
        f"{name} over the model": (name, {"scope": "model"})
        for name in ("model_stock", "slerp", "multi_slerp", "karcher")
    },
}
"""Every method on entries at its defaults, and where it takes another way through the engine."""

NOISY = {
    "flame with noise": ("flame", {"noise": 0.1}),
    "crfl with noise": ("crfl", {"sigma": 0.5}),
}


def vectors(count: int = COUNT, *, dense: bool = True) -> list[TaskVector]:
    found = []
    for client in range(count):
        own, common = torch.Generator().manual_seed(client), torch.Generator().manual_seed(99)

        def draw(*shape: int) -> Tensor:
            # Something in common, or Model Stock would rightly stay where it is.
            both = [torch.randn(*shape, generator=g) for g in (own, common)]  # noqa: B023
            return both[0] + both[1] / 2

        deltas: dict[str, Delta] = {
            "tall": LowRank(draw(150, 3), draw(3, 33)),
            "wide": LowRank(draw(37, 2 + client % 2), draw(2 + client % 2, 130)),
        }
        if dense:
            deltas |= {"head.bias": draw(130), "head.kernel": draw(40, 3, 5), "scalar": draw(1)[0]}
        found.append(TaskVector(deltas))
    return found


def entries(vector: TaskVector) -> dict[str, Tensor]:
    return {n: d.dense() if isinstance(d, LowRank) else d for n, d in vector.items()}


def smallest_budget(columns: int = 130) -> int:
    return 2 * COUNT * columns * 4 * WORKING_COPIES * ROW_BLOCK


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def same_rank(found: list[TaskVector]) -> list[TaskVector]:
    return [TaskVector({"tall": vector.deltas["tall"]}) for vector in found]


def cohort_for(name: str) -> list[TaskVector]:
    return vectors(2 if name == "slerp" else COUNT)


def expected(
    name: str, params: dict[str, Any], cohort: list[TaskVector], weights_C: Tensor
) -> dict[str, Tensor]:
    """The method called on whole tensors, or on the whole model where that is its scope."""
    method = next(m for m in BUILT_IN if m.name == name)
    config = method.config(**params)
    whole = [entries(vector) for vector in cohort]
    modules = sorted(whole[0])
    if method.scope_of(config) == "model":
        flat_CD = torch.stack([torch.cat([v[m].flatten() for m in modules]) for v in whole])
        parts = method(flat_CD, weights_C, config).split([whole[0][m].numel() for m in modules])
        return {m: p.view(whole[0][m].shape) for m, p in zip(modules, parts, strict=True)}
    return {
        m: method(torch.stack([v[m] for v in whole]), weights_C, config, module=m) for m in modules
    }


@pytest.fixture(params=["torch", "kernels"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the engine, whatever the size."""
    smallest = 1 if request.param == "kernels" else 1 << 60
    monkeypatch.setattr(kernel_rows, "SMALLEST", smallest)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("variant", {**VARIANTS, **NOISY})
def test_the_budget_changes_no_bit(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "PIECE", 500)
    name, params = {**VARIANTS, **NOISY}[variant]
    cohort = cohort_for(name)
    recipe = Recipe(method=name, params=params, weights=(1, 2, 3, 4, 5)[: len(cohort)])
    roomy = merge_task_vectors(cohort, recipe)
    for budget_bytes in (smallest_budget(), 2 * smallest_budget()):
        tight = merge_task_vectors(cohort, recipe, budget_bytes=budget_bytes)
        assert_same_bits(entries(roomy), entries(tight))


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_is_the_method_on_whole_tensors(variant: str) -> None:
    name, params = VARIANTS[variant]
    cohort = cohort_for(name)
    weights = [1.0, 2, 3, 4, 5][: len(cohort)]
    recipe = Recipe(method=name, params=params, scale=0.5)
    merged = entries(merge_task_vectors(cohort, recipe, weights=weights))
    whole = expected(name, params, cohort, torch.tensor(weights))
    assert any(bool(merged_mn.any()) for merged_mn in merged.values())
    for module, merged_mn in merged.items():
        torch.testing.assert_close(merged_mn, 0.5 * whole[module], atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_entries_stream_to_the_same_bits(variant: str) -> None:
    """Products of factors are formed by blocks of rows, so only entries compare to the last bit."""
    name, params = VARIANTS[variant]
    cohort = [TaskVector(entries(vector)) for vector in cohort_for(name)]
    merged = entries(merge_task_vectors(cohort, Recipe(method=name, params=params)))
    whole = expected(name, params, cohort, torch.ones(len(cohort)))
    if next(m for m in BUILT_IN if m.name == name).coefficients is not None:
        # Over the model, inner products are added module by module.
        for module, merged_mn in merged.items():
            torch.testing.assert_close(merged_mn, whole[module], atol=1e-6, rtol=1e-6)
    else:
        assert_same_bits(merged, whole)


def test_fedit_streams_factors_apart() -> None:
    cohort = same_rank(vectors())
    recipe = Recipe(method="fedit", scale=0.5)
    merged = entries(merge_task_vectors(cohort, recipe, weights=[1, 2, 3, 4, 5]))
    weights_C = torch.tensor([1.0, 2, 3, 4, 5])
    b_mk = sum(w * v.deltas["tall"].b_mk for w, v in zip(weights_C, cohort, strict=True)) / 15
    a_kn = sum(w * v.deltas["tall"].a_kn for w, v in zip(weights_C, cohort, strict=True)) / 15
    torch.testing.assert_close(merged["tall"], 0.5 * b_mk @ a_kn, atol=1e-5, rtol=1e-4)


def test_ties_over_the_model_trims_over_the_model() -> None:
    cohort = vectors()
    whole = [entries(vector) for vector in cohort]
    modules = sorted(whole[0])
    flat_CD = torch.stack([torch.cat([v[m].flatten() for m in modules]) for v in whole])
    expected_D = TIES(flat_CD, torch.ones(COUNT), TiesConfig(density=0.1))
    recipe = Recipe(method="ties", params={"scope": "model", "density": 0.1})
    merged = entries(merge_task_vectors(cohort, recipe))
    merged_D = torch.cat([merged[m].flatten() for m in modules])
    torch.testing.assert_close(merged_D, expected_D, atol=1e-6, rtol=1e-5)
    per_tensor = entries(merge_task_vectors(cohort, Recipe(method="ties", params={"density": 0.1})))
    assert not torch.equal(merged["tall"], per_tensor["tall"])


def test_dare_masks_are_named_by_seed_module_and_client() -> None:
    cohort = vectors(2)
    recipe = Recipe(method="dare_linear", params={"density": 0.4, "seed": 11})
    merged = entries(merge_task_vectors(cohort, recipe))
    for module, merged_mn in merged.items():
        expected = torch.zeros(merged_mn.numel())
        for client, vector in enumerate(cohort):
            keep_D = uniform(merged_mn.numel(), (11, module, client)) < 0.4
            expected += keep_D * entries(vector)[module].flatten() / 0.4 / 2
        torch.testing.assert_close(merged_mn.flatten(), expected)


@pytest.mark.parametrize("name", [m.name for m in BUILT_IN if m.coefficients is not None])
def test_linear_methods_stay_factors(name: str) -> None:
    cohort = vectors(2 if name == "slerp" else COUNT, dense=False)
    params = NEEDS.get(name, {})
    merged = merge_task_vectors(cohort, Recipe(method=name, params=params))
    assert all(isinstance(delta, LowRank) for delta in merged.deltas.values())
    assert merged.deltas["wide"].shape == (37, 130)


def test_factors_and_dense_entries_of_one_module_merge() -> None:
    cohort = vectors(dense=False)
    mixed = [
        TaskVector(entries(vector)) if client % 2 else vector
        for client, vector in enumerate(cohort)
    ]
    for name in ("mean", "ties"):
        one = entries(merge_task_vectors(cohort, Recipe(method=name)))
        other = entries(merge_task_vectors(mixed, Recipe(method=name)))
        for module in one:
            torch.testing.assert_close(one[module], other[module], atol=1e-5, rtol=1e-4)


def test_bfloat16_contributions_are_merged_in_fp32() -> None:
    halves = [
        TaskVector(
            {
                "a": LowRank(v.deltas["tall"].b_mk.bfloat16(), v.deltas["tall"].a_kn.bfloat16()),
                "b": v.deltas["head.bias"].bfloat16(),
            }
        )
        for v in vectors()
    ]
    wide = [
        TaskVector(
            {
                "a": LowRank(v.deltas["a"].b_mk.float(), v.deltas["a"].a_kn.float()),
                "b": v.deltas["b"].float(),
            }
        )
        for v in halves
    ]
    for name in ("ties", "mean"):
        recipe = Recipe(method=name)
        assert_same_bits(
            entries(merge_task_vectors(halves, recipe)), entries(merge_task_vectors(wide, recipe))
        )


def test_an_all_zero_merge_is_zero() -> None:
    cohort = [TaskVector({"a": LowRank(torch.zeros(4, 1), torch.ones(1, 5))})] * 3
    for name in NAMES:
        params = {"multi_krum": {"f": 0}, **NEEDS}.get(name, {})
        some = cohort[:2] if name == "slerp" else cohort
        merged = entries(merge_task_vectors(some, Recipe(method=name, params=params)))
        assert torch.equal(merged["a"], torch.zeros(4, 5)), name


def replaced(cohort: list[TaskVector], client: int, **deltas: Delta) -> list[TaskVector]:
    changed = list(cohort)
    changed[client] = TaskVector({**cohort[client].deltas, **deltas}, cohort[client].base_hash)
    return changed


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    cohort = vectors()
    broken = LowRank(torch.full((150, 3), bad), torch.ones(3, 33))
    names = [f"hospital-{letter}" for letter in "abcde"]
    with pytest.raises(ValueError, match=r"hospital-c: module tall holds numbers .* not finite"):
        merge_task_vectors(replaced(cohort, 2, tall=broken), Recipe(method="mean"), names=names)
    head = cohort[1].deltas["head.bias"].clone()
    head[3] = bad
    with pytest.raises(ValueError, match=r"contribution 1: module head\.bias holds numbers"):
        merge_task_vectors(replaced(cohort, 1, **{"head.bias": head}), Recipe(method="median"))


def test_dense_entries_that_are_not_finite_show_in_a_sum_or_are_looked_for() -> None:
    cohort = vectors()
    head = cohort[1].deltas["head.bias"].clone()
    for bad in (float("nan"), float("inf"), -float("inf")):
        head[3] = bad
        broken = replaced(cohort, 1, **{"head.bias": head})
        for weights in ([1.0] * COUNT, [1.0, 0, 1, 1, 1]):
            with pytest.raises(ValueError, match=r"contribution 1: module head\.bias holds"):
                merge_task_vectors(broken, Recipe(method="mean"), weights=weights)


def test_factors_whose_product_overflows_are_refused() -> None:
    broken = LowRank(torch.full((150, 3), 1e30), torch.full((3, 33), 1e30))
    with pytest.raises(ValueError, match="contribution 0: module tall"):
        merge_task_vectors(replaced(vectors(), 0, tall=broken), Recipe(method="mean"))


def test_contributions_that_do_not_belong_together_are_refused() -> None:
    cohort = vectors()
    recipe = Recipe(method="mean")
    with pytest.raises(ValueError, match=r"contribution 3 and contribution 0 change .* as extra"):
        merge_task_vectors(replaced(cohort, 3, extra=torch.ones(2)), recipe)
    with pytest.raises(ValueError, match=r"contribution 4: module scalar has shape \(2,\)"):
        merge_task_vectors(replaced(cohort, 4, scalar=torch.ones(2)), recipe)
    with pytest.raises(ValueError, match=r"holds torch\.int64"):
        merge_task_vectors(replaced(cohort, 0, scalar=torch.tensor(1)), recipe)
    other_base = [
        TaskVector(v.deltas, h * 16) for v, h in zip(cohort, ["aaaa", "bbbb"], strict=False)
    ]
    with pytest.raises(ValueError, match="contribution 1 was trained on base bbbbbbbbbbbb"):
        merge_task_vectors(other_base, recipe)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_task_vectors([], recipe)
    with pytest.raises(ValueError, match="1 names for 5 contributions"):
        merge_task_vectors(cohort, recipe, names=["one"])


def test_a_base_stated_by_one_is_the_base_of_the_merge() -> None:
    cohort = vectors()
    cohort[3] = TaskVector(cohort[3].deltas, "cafe")
    assert merge_task_vectors(cohort, Recipe(method="mean")).base_hash == "cafe"


def test_a_budget_too_small_says_what_it_takes() -> None:
    needed = smallest_budget()
    with pytest.raises(ValueError, match=f"budget_bytes: {needed - 1} cannot .* least {needed}"):
        merge_task_vectors(vectors(), Recipe(method="ties"), budget_bytes=needed - 1)


def test_fedit_needs_factors_of_one_rank() -> None:
    with pytest.raises(ValueError, match=r"fedit: module wide: .*'contribution 1': 3.* use mean"):
        merge_task_vectors(vectors(), Recipe(method="fedit"))


def test_the_callers_weights_come_before_the_recipes() -> None:
    cohort = vectors()
    recipe = Recipe(method="mean", weights=(1, 0, 0, 0, 0))
    merged = entries(merge_task_vectors(cohort, recipe))
    torch.testing.assert_close(merged["tall"], entries(cohort[0])["tall"])
    merged = entries(merge_task_vectors(cohort, recipe, weights=[0, 0, 1, 0, 0]))
    torch.testing.assert_close(merged["tall"], entries(cohort[2])["tall"])

"""Adapters in, one adapter out: what it adds to the base is what the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import MergeResult, Recipe, merge
from anabranch.aggregation.engine import rows as rows_module
from anabranch.aggregation.engine.rows import ROW_BLOCK, WORKING_COPIES
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter, LoraFactors, task_vector

MakeAdapter = Callable[..., Adapter]
WEIGHTS = (1.0, 2.0, 3.0)


def product(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.b_mr.double() @ factors.a_rn.double()


def products(adapter: Adapter) -> dict[str, Tensor]:
    return {name: product(factors) for name, factors in adapter.lora.items()}


def best(matrix_mn: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix_mn, full_matrices=False)
    return u[:, :rank] @ s[:rank].diag() @ v[:rank]


def assert_near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.float(), other.float(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("method", ["mean", "task_arithmetic"])
def test_linear_merges_add_the_start_back_before_they_truncate(
    make_adapter: MakeAdapter, method: str, with_start: bool
) -> None:
    adapters = [make_adapter(seed) for seed in range(3)]
    start = make_adapter(9) if with_start else None
    result = merge(adapters, Recipe(method=method, scale=0.7, weights=WEIGHTS), start=start)
    total = 6 if method == "mean" else 1
    for name, merged_mn in products(result.adapter).items():
        before = product(start.lora[name]) if start else torch.zeros_like(merged_mn)
        change = sum(
            w * (products(adapter)[name] - before) / total
            for w, adapter in zip(WEIGHTS, adapters, strict=True)
        )
        exact = before + 0.7 * change
        assert_near(merged_mn, best(exact, 4))
        error = float((exact - best(exact, 4)).norm() / exact.norm())
        assert result.report.truncation[name] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("budget_bytes", [2 << 30, 2 * 3 * 70 * 4 * WORKING_COPIES * ROW_BLOCK])
def test_entry_merges_add_the_start_back_before_they_truncate(
    make_adapter: MakeAdapter, budget_bytes: int
) -> None:
    start = make_adapter(9)
    adapters = [make_adapter(seed, near=start) for seed in range(3)]
    recipe = Recipe(method="ties", params={"density": 0.3}, scale=0.7, weights=WEIGHTS)
    result = merge(adapters, recipe, start=start, budget_bytes=budget_bytes)
    for name, merged_mn in products(result.adapter).items():
        before = product(start.lora[name])
        deltas_CD = torch.stack([(products(a)[name] - before).flatten() for a in adapters]).float()
        change = TIES(deltas_CD, torch.tensor(WEIGHTS), TiesConfig(density=0.3)).view_as(before)
        exact = before + 0.7 * change
        error = float((exact - best(exact, 4)).norm() / exact.norm())
        assert result.report.truncation[name] == pytest.approx(error, rel=0.02)
        apart = float((exact - merged_mn).norm() / exact.norm())
        assert apart == pytest.approx(result.report.truncation[name], rel=1e-3)


def test_a_module_too_large_to_keep_is_formed_again_with_the_same_result(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"long": (1600, 8)}
    start = make_adapter(9, shapes)
    adapters = [make_adapter(seed, shapes, near=start) for seed in range(3)]
    recipe = Recipe(method="ties", params={"density": 0.3})
    roomy = merge(adapters, recipe, start=start)
    formed = []
    fill = rows_module.fill_rows
    monkeypatch.setattr(rows_module, "fill_rows", lambda *a: (formed.append(1), fill(*a)))
    budget_bytes = 2 * 3 * 8 * 4 * WORKING_COPIES * ROW_BLOCK
    assert budget_bytes // 2 < 1600 * 8 * 4
    tight = merge(adapters, recipe, start=start, budget_bytes=budget_bytes)
    # 50 chunks of 3 contributions, for two passes of thresholds and five reads of the sketch.
    assert len(formed) == 50 * 3 * 7
    assert_near(product(tight.adapter.lora["long"]), product(roomy.adapter.lora["long"]))
    assert tight.report.overall_truncation == pytest.approx(roomy.report.overall_truncation)


def test_overall_truncation_is_over_all_modules(make_adapter: MakeAdapter) -> None:
    adapters = [make_adapter(seed) for seed in range(3)]
    result = merge(adapters, Recipe(method="mean"))
    exact = {n: sum(products(a)[n] for a in adapters) / 3 for n in adapters[0].lora}
    lost = sum(float((exact[n] - m).square().sum()) for n, m in products(result.adapter).items())
    norm = sum(float(e.square().sum()) for e in exact.values())
    assert result.report.overall_truncation == pytest.approx((lost / norm) ** 0.5, rel=1e-5)


def test_stacking_is_exact_and_the_start_drops_out_of_a_mean(make_adapter: MakeAdapter) -> None:
    adapters = [make_adapter(seed, rank=2 + seed) for seed in range(3)]
    recipe = Recipe(method="mean", refactor=Refactor(kind="stack"))
    result = merge(adapters, recipe, start=make_adapter(9))
    for name, merged_mn in products(result.adapter).items():
        assert_near(merged_mn, sum(products(a)[name] for a in adapters) / 3)
        assert result.adapter.lora[name].rank == 2 + 3 + 4
    assert result.report.truncation == {}
    assert result.report.overall_truncation == 0


def test_stacking_needs_a_linear_method(make_adapter: MakeAdapter) -> None:
    recipe = Recipe(method="ties", refactor=Refactor(kind="stack"))
    with pytest.raises(
        ValueError, match=r"refactor.kind: .* ties gives no such sum; set it to svd"
    ):
        merge([make_adapter(0)], recipe)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_may_differ_and_the_target_may_too(make_adapter: MakeAdapter, rslora: bool) -> None:
    adapters = [make_adapter(seed, rank=2 + seed, rslora=rslora) for seed in range(3)]
    largest = merge(adapters, Recipe(method="mean")).adapter
    assert {factors.rank for factors in largest.lora.values()} == {4}
    whole = merge(adapters, Recipe(method="mean", refactor=Refactor(rank=9))).adapter
    for name, merged_mn in products(whole).items():
        assert whole.lora[name].rank == 9
        assert whole.lora[name].rslora is rslora
        assert whole.lora[name].scaling == pytest.approx(adapters[0].lora[name].scaling)
        assert_near(merged_mn, sum(products(a)[name] for a in adapters) / 3)


KEEP_ALL = {
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": {"density": 1.0},
    "consensus": {"mask_scale": 0.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "della_linear": {"density": 1.0, "epsilon": 0.0},
    "multi_krum": {"f": 0},
    "bulyan": {"f": 0},
    "crfl": {"sigma": 0},
    "fltrust": {"root": "contribution 0"},
    "ties": {"density": 1.0},
    "rank_vote": {"density": 1.0},
    "robust_ties": {"density": 1.0},
}

UNLIKE_THEIRS = {
    "fisher": "needs importance",
    "pcb": "only entries with the best scores take part, whatever is set",
    "sign_vote": "keeps signs only",
}


@pytest.mark.parametrize(
    "name", sorted({m.name for m in BUILT_IN if m.matrices is None} - UNLIKE_THEIRS.keys())
)
def test_merging_an_adapter_with_itself_changes_nothing(
    make_adapter: MakeAdapter, name: str
) -> None:
    adapter = make_adapter(1, head=True)
    start = adapter.with_tensors({k: torch.zeros_like(t) for k, t in adapter.tensors().items()})
    recipe = Recipe(method=name, params=KEEP_ALL.get(name, {}))
    weights = [0.4, 0.6] if name == "slerp" else [0.2, 0.3, 0.5]
    result = merge([adapter] * len(weights), recipe, start=start, weights=weights)
    for module, merged_mn in products(result.adapter).items():
        assert_near(merged_mn, product(adapter.lora[module]))
    for module, tensor in adapter.dense.items():
        assert_near(result.adapter.dense[module], tensor)
    assert result.report.overall_truncation < 1e-6


@pytest.mark.parametrize("kind", ["svd", "stack"])
@pytest.mark.parametrize("name", ["model_stock", "multi_slerp", "karcher"])
def test_coefficients_that_differ_by_module(
    make_adapter: MakeAdapter, name: str, kind: Literal["svd", "stack"]
) -> None:
    start = make_adapter(9, head=True)
    # They share a first step, or Model Stock would rightly stay at the start.
    step = make_adapter(8, head=True, near=start)
    adapters = [make_adapter(seed, head=True, near=step) for seed in range(3)]
    refactor = Refactor(kind=kind, rank=20 if kind == "svd" else None)
    recipe = Recipe(method=name, scale=0.5, refactor=refactor)
    result = merge(adapters, recipe, start=start)
    method = next(m for m in BUILT_IN if m.name == name)
    for module, merged_mn in products(result.adapter).items():
        before_mn = product(start.lora[module])
        changes = torch.stack([product(a.lora[module]) - before_mn for a in adapters])
        assert_near(merged_mn, before_mn + 0.5 * method(changes))
    for module, tensor in result.adapter.dense.items():
        before = start.dense[module]
        changes = torch.stack([adapter.dense[module] - before for adapter in adapters])
        assert_near(tensor, before + 0.5 * method(changes))
    assert result.report.coefficients is None
    over_model = Recipe(method=name, params={"scope": "model"}, refactor=refactor)
    shared = merge(adapters, over_model, start=start).report.coefficients
    assert shared is not None
    assert all(coefficient > 0 for coefficient in shared)


def test_dense_parameters_move_from_the_start(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9, head=True)
    adapters = [make_adapter(seed, head=True) for seed in range(3)]
    for method in ("mean", "median"):
        result = merge(adapters, Recipe(method=method, scale=0.5), start=start)
        for name, before in start.dense.items():
            values = torch.stack([a.dense[name] for a in adapters])
            middle = values.mean(0) if method == "mean" else values.median(0).values
            assert_near(result.adapter.dense[name], before + 0.5 * (middle - before))
    with pytest.raises(ValueError, match=r"site-b: .*head.bias, head.weight.*started from"):
        merge([make_adapter(0), adapters[1]], Recipe(method="mean"), names=["site-a", "site-b"])


def test_fedit_averages_the_factors_apart(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    adapters = [make_adapter(seed, near=start) for seed in range(3)]
    result = merge(adapters, Recipe(method="fedit", weights=WEIGHTS, scale=0.5), start=start)
    for name, factors in result.adapter.lora.items():
        mean_a = sum(w * a.lora[name].a_rn for w, a in zip(WEIGHTS, adapters, strict=True)) / 6
        mean_b = sum(w * a.lora[name].b_mr for w, a in zip(WEIGHTS, adapters, strict=True)) / 6
        assert_near(factors.a_rn, (start.lora[name].a_rn + mean_a) / 2)
        assert_near(factors.b_mr, (start.lora[name].b_mr + mean_b) / 2)
    assert result.report.truncation == {}
    exact = merge(adapters, Recipe(method="mean", weights=WEIGHTS), start=start)
    biased = merge(adapters, Recipe(method="fedit", weights=WEIGHTS), start=start)
    name = "deep.query"
    assert not torch.allclose(
        product(biased.adapter.lora[name]), product(exact.adapter.lora[name]), atol=1e-2
    )


def test_fedit_is_exact_when_a_is_shared(make_adapter: MakeAdapter) -> None:
    """FFA-LoRA: with A frozen, averaging B is averaging ΔW."""
    start = make_adapter(9)
    adapters = []
    for seed in range(3):
        other = make_adapter(seed)
        adapters.append(
            replace(
                start, lora={n: replace(f, b_mr=other.lora[n].b_mr) for n, f in start.lora.items()}
            )
        )
    one = merge(adapters, Recipe(method="fedit"), start=start).adapter
    other = merge(adapters, Recipe(method="mean"), start=start)
    assert other.report.overall_truncation < 1e-6
    for name, merged_mn in products(one).items():
        assert_near(merged_mn, product(other.adapter.lora[name]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 3}, "contribution 1 has rank 3, contribution 0 has rank 4"),
        ({"alpha": 4.0}, r"contribution 1 scales by 1\.0, contribution 0 by 2\.0"),
    ],
)
def test_fedit_refuses_what_it_cannot_average(
    make_adapter: MakeAdapter, change: dict[str, float], reason: str
) -> None:
    adapters = [make_adapter(0), make_adapter(1, **change)]
    if "rank" in change:
        adapters[1] = make_adapter(1, rank=3, alpha=6.0)
    with pytest.raises(ValueError, match=f"fedit: module deep.query: {reason}.*; use mean"):
        merge(adapters, Recipe(method="fedit"))


def test_a_rank_beyond_every_module_is_refused(make_adapter: MakeAdapter) -> None:
    adapters = [make_adapter(seed) for seed in range(2)]
    with pytest.raises(ValueError, match=r"refactor.rank: 100000 is above \d+, the largest"):
        merge(adapters, Recipe(method="mean", refactor=Refactor(rank=100_000)))


def test_fedit_keeps_its_rank(make_adapter: MakeAdapter) -> None:
    with pytest.raises(ValueError, match=r"keeps rank 4 and cannot go to refactor.rank 2"):
        merge([make_adapter(0)], Recipe(method="fedit", refactor=Refactor(rank=2)))
    adapters = [make_adapter(0, rank=2, alpha=4.0)]
    with pytest.raises(ValueError, match=r"contribution 0 has rank 2, the start has rank 4"):
        merge(adapters, Recipe(method="fedit"), start=make_adapter(9))


def test_the_report_says_who_counted_and_who_agrees(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    honest = [make_adapter(seed, near=start) for seed in range(6)]
    loud = make_adapter(77)
    recipe = Recipe(method="multi_krum", params={"f": 1})
    result = merge([*honest, loud], recipe, start=start, names=[*"abcdef", "loud"])
    assert isinstance(result, MergeResult)
    assert result.report.names == (*"abcdef", "loud")
    assert result.report.coefficients == (*[1 / 6] * 6, 0.0)
    vectors = [task_vector(adapter, start) for adapter in [*honest, loud]]
    flat_CD = torch.stack([torch.cat([d.dense().flatten() for _, d in v.items()]) for v in vectors])
    assert_near(torch.tensor(result.report.cosine).diagonal(), torch.ones(7))
    unit_CD = flat_CD / flat_CD.norm(dim=1, keepdim=True)
    assert_near(torch.tensor(result.report.cosine), unit_CD @ unit_CD.T)
    assert merge(honest, Recipe(method="median"), start=start).report.coefficients is None


def test_alignment_does_not_change_what_is_merged(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    adapters = [make_adapter(seed, near=start) for seed in range(3)]
    aligned = merge(adapters, Recipe(method="mean"), start=start).adapter
    free = merge(
        adapters, Recipe(method="mean", refactor=Refactor(align=False)), start=start
    ).adapter
    for name in aligned.lora:
        assert_near(product(aligned.lora[name]), product(free.lora[name]))
        before = start.lora[name].a_rn
        assert (aligned.lora[name].a_rn - before).norm() < (free.lora[name].a_rn - before).norm()


def test_the_merged_adapter_takes_after_the_start(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9, alpha=16.0)
    halves = replace(
        start,
        lora={
            n: replace(f, a_rn=f.a_rn.bfloat16(), b_mr=f.b_mr.bfloat16())
            for n, f in start.lora.items()
        },
    )
    adapters = [make_adapter(seed) for seed in range(3)]
    merged = merge(adapters, Recipe(method="ties"), start=halves).adapter
    assert merged.peft == start.peft
    assert merged.base_hash == start.base_hash
    assert {f.alpha for f in merged.lora.values()} == {16.0}
    assert {f.a_rn.dtype for f in merged.lora.values()} == {torch.bfloat16}
    assert merged.with_tensors(halves.tensors()).hash() == halves.hash()


def test_merging_twice_gives_the_same_bits(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9, head=True)
    adapters = [make_adapter(seed, head=True) for seed in range(3)]
    for method in ("mean", "ties", "dare_ties", "geometric_median"):
        one, other = (merge(adapters, Recipe(method=method), start=start) for _ in range(2))
        assert one.adapter.hash() == other.adapter.hash(), method


def test_mismatches_are_refused_by_name(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    recipe = Recipe(method="mean")
    stranger = make_adapter(0, {"deep.query": (40, 24)})
    with pytest.raises(ValueError, match=r"b: .* same modules, such as deep.value"):
        merge([make_adapter(1), stranger], recipe, start=start, names=["a", "b"])
    with pytest.raises(ValueError, match=r"b and a change different modules"):
        merge([make_adapter(1), stranger], recipe, names=["a", "b"])
    bent = make_adapter(0, {"deep.query": (40, 25), "deep.value": (24, 70)})
    with pytest.raises(ValueError, match=r"b: deep.query has shape \(40, 25\), in the start"):
        merge([make_adapter(1), bent], recipe, start=start, names=["a", "b"])
    other_base = replace(make_adapter(1), base_hash="feed" * 16)
    with pytest.raises(
        ValueError, match="the start was trained on base ba5eba5eba5e, a on feedfeed"
    ):
        merge([other_base], recipe, start=start, names=["a"])
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([], recipe)
    with pytest.raises(ValueError, match="1 names for 2 contributions"):
        merge([start, start], recipe, names=["a"])


def test_half_precision_is_rounded_once(make_adapter: MakeAdapter) -> None:
    """A scaling of 1/3 folded into bfloat16 factors would lose three digits."""
    wide = make_adapter(1, alpha=4 / 3)
    halves = replace(
        wide,
        lora={
            n: replace(f, a_rn=f.a_rn.bfloat16(), b_mr=f.b_mr.bfloat16())
            for n, f in wide.lora.items()
        },
    )
    for factors in halves.lora.values():
        torch.testing.assert_close(factors.delta().dense(), product(factors).float())


def test_a_part_of_the_cohort_with_no_say_leaves_the_start(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    recipe = Recipe(method="task_arithmetic", weights=(0, 0))
    merged = merge([make_adapter(0), make_adapter(1)], recipe, start=start).adapter
    for name, merged_mn in products(merged).items():
        assert_near(merged_mn, product(start.lora[name]))
    bare = merge([make_adapter(0), make_adapter(1)], recipe).adapter
    assert not any(product(factors).any() for factors in bare.lora.values())
    assert all(bool(factors.a_rn.any()) for factors in bare.lora.values())

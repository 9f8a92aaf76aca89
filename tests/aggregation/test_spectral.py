"""Spectral methods against the formulas on dense matrices, in the core space and end to end.

The naive loops below follow the papers on task vectors of full rank; on those they agree with
FusionBench 0.2.33 (TSV-M, Iso-C, Iso-CTS, OPCM), checked once, since it does not install beside us.
Of task vectors of lower rank the papers' code takes singular vectors of value zero, which are
whatever LAPACK left there; the loops take the true ranks as arguments and stop at those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_task_vectors
from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.iso_c import ISO_C
from anabranch.aggregation.methods.iso_cts import ISO_CTS, IsoCtsConfig
from anabranch.aggregation.methods.iso_cts import split as split_directions
from anabranch.aggregation.methods.knots_ties import KNOTS_TIES, KnotsTiesConfig, shared_basis
from anabranch.aggregation.methods.lora_lego import LORA_LEGO
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.opcm import OPCM
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.methods.tsv_m import TSV_M, TsvMConfig
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter, LoraFactors, LowRank, TaskVector

MakeAdapter = Callable[..., Adapter]
UNIT = [1.0, 1.0, 1.0]
UNEVEN = [1.0, 3.0, 2.0]
"""1.5 times a mean of one: weights are relative."""
SHAPES = [(24, 24), (40, 24), (21, 37)]
RANKS = (2, 5, 4)


def full(m: int, n: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(m * n)
    return torch.randn(count, m, n, generator=generator, dtype=torch.float64)


def low(m: int, n: int, ranks: Sequence[int] = RANKS) -> list[LowRank]:
    generator = torch.Generator().manual_seed(m + n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(m, rank), draw(rank, n)) for rank in ranks]


def dense(delta: LowRank) -> Tensor:
    return delta.b_mk @ delta.a_kn


def relative(weights: Sequence[float]) -> list[float]:
    return [weight * len(weights) / sum(weights) for weight in weights]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


def procrustes(stack_mk: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(stack_mk, full_matrices=False)
    assert float(s[-1]) > 1e-6, "the naive polar factor needs independent columns"
    return u @ v


def naive_tsv_m(taus: Sequence[Tensor], weights: Sequence[float], kept: Sequence[int]) -> Tensor:
    lefts, values, rights = [], [], []
    for tau, weight, k in zip(taus, relative(weights), kept, strict=True):
        u, s, v = torch.linalg.svd(tau, full_matrices=False)
        lefts.append(u[:, :k])
        values.append(weight * s[:k])
        rights.append(v[:k].T)
    left, right = procrustes(torch.cat(lefts, 1)), procrustes(torch.cat(rights, 1))
    return left @ torch.cat(values).diag() @ right.T


def naive_iso_c(taus: Sequence[Tensor], weights: Sequence[float], rank: int) -> Tensor:
    total = sum(w * tau for w, tau in zip(relative(weights), taus, strict=True))
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    return sum(s[:rank]) / rank * u[:, :rank] @ v[:rank]


def naive_iso_cts(
    taus: Sequence[Tensor], weights: Sequence[float], rank: int, share: float
) -> Tensor:
    total = sum(w * tau for w, tau in zip(relative(weights), taus, strict=True))
    each = round((rank - int(rank * share)) / len(taus))
    common = rank - each * len(taus)
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    lefts, values, rights = [u[:, :common]], [s[:common]], [v[:common].T]
    for tau, weight in zip(taus, relative(weights), strict=True):
        rest = weight * tau - u[:, :common] @ u[:, :common].T @ (weight * tau)
        u_t, s_t, v_t = torch.linalg.svd(rest, full_matrices=False)
        lefts.append(u_t[:, :each])
        values.append(s_t[:each])
        rights.append(v_t[:each].T)
    left, right = procrustes(torch.cat(lefts, 1)), procrustes(torch.cat(rights, 1))
    return torch.cat(values).mean() * left @ right.T


def naive_knots_ties(taus: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    u, s, v = torch.linalg.svd(torch.cat(list(taus), 1), full_matrices=False)
    supported = s > 1e-5
    pieces = (s[supported, None] * v[supported]).split(taus[0].shape[1], dim=1)
    flat_CD = torch.stack([piece.flatten().float() for piece in pieces])
    merged = TIES(flat_CD, torch.tensor(weights), TiesConfig(density=density))
    return u[:, supported] @ merged.view_as(pieces[0]).double()


def call(method: MergeMethod, deltas: object, weights: Sequence[float], config: object) -> object:
    weights_C = method.check_weights(torch.tensor(weights), len(weights))
    return method.merge_modules({"m": deltas}, weights_C, config)["m"]  # type: ignore[dict-item,arg-type]


@pytest.mark.parametrize("weights", [UNIT, UNEVEN])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_on_full_rank_they_are_the_papers(m: int, n: int, weights: list[float]) -> None:
    taus = full(m, n)
    weights_C = torch.tensor(weights)
    d = min(m, n)
    assert apart(TSV_M(taus, weights_C), naive_tsv_m(taus, weights, [d // 3] * 3)) < 1e-6
    assert apart(ISO_C(taus, weights_C), naive_iso_c(taus, weights, d)) < 1e-6
    for share in (0.8, 0.3):
        found = ISO_CTS(taus, weights_C, IsoCtsConfig(common=share))
        assert apart(found, naive_iso_cts(taus, weights, d, share)) < 1e-6
    found = KNOTS_TIES(taus, weights_C, KnotsTiesConfig(density=0.3))
    assert apart(found, naive_knots_ties(taus, weights, 0.3)) < 1e-6


@pytest.mark.parametrize("weights", [UNIT, UNEVEN])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_adapters_merge_in_the_core_space_as_the_formula_does_at_their_rank(
    m: int, n: int, weights: list[float]
) -> None:
    deltas = low(m, n)
    taus = [dense(delta) for delta in deltas]
    cases = [
        (TSV_M, TSV_M.config(), naive_tsv_m(taus, weights, RANKS)),
        (TSV_M, TsvMConfig(rank=3), naive_tsv_m(taus, weights, [2, 3, 3])),
        (ISO_C, ISO_C.config(), naive_iso_c(taus, weights, sum(RANKS))),
        (ISO_CTS, ISO_CTS.config(), naive_iso_cts(taus, weights, sum(RANKS), 0.8)),
        (KNOTS_TIES, KNOTS_TIES.config(), naive_knots_ties(taus, weights, 0.2)),
    ]
    for method, config, expected_mn in cases:
        merged = call(method, deltas, weights, config)
        assert isinstance(merged, LowRank)
        assert merged.rank <= sum(RANKS)
        found_mn = merged.b_mk.double() @ merged.a_kn.double()
        assert apart(found_mn, expected_mn) < 1e-6, method.name
        whole_mn = call(method, taus, weights, config)
        assert isinstance(whole_mn, Tensor)
        assert apart(whole_mn, expected_mn) < 1e-6, method.name


def test_the_papers_formulas_on_adapters_are_chance_and_ours_are_not() -> None:
    """The trap: a change in the eighth digit moves the papers' results by a tenth and more."""
    taus = torch.stack([dense(delta) for delta in low(40, 24, (2, 2, 2))])
    moved = taus + 1e-8 * full(40, 24)
    d = 24
    assert apart(naive_iso_c(moved, UNIT, d), naive_iso_c(taus, UNIT, d)) > 0.1
    assert apart(naive_tsv_m(moved, UNIT, [8] * 3), naive_tsv_m(taus, UNIT, [8] * 3)) > 0.1
    for method in (TSV_M, ISO_C, ISO_CTS, OPCM):
        assert apart(method(moved), method(taus)) < 1e-5, method.name


def test_linear_knots_is_task_arithmetic() -> None:
    for deltas in (low(40, 24), [dense(delta) for delta in low(40, 24)]):
        basis_mr, z_Crn = shared_basis(deltas)
        assert basis_mr.shape[1] == sum(RANKS)
        summed_rn = sum(w * z_rn for w, z_rn in zip(UNEVEN, z_Crn, strict=True))
        expected_mn = sum(w * dense(delta) for w, delta in zip(UNEVEN, low(40, 24), strict=True))
        assert apart(basis_mr @ summed_rn.double(), expected_mn) < 1e-6


def test_knots_trims_in_its_own_basis() -> None:
    taus = torch.stack([dense(delta) for delta in low(40, 24)]).float()
    plain_mn = TIES(taus.flatten(1), torch.ones(3), TiesConfig(density=0.2)).view(40, 24)
    assert apart(KNOTS_TIES(taus), plain_mn.double()) > 0.1


def test_iso_cts_divides_the_directions_as_its_authors_do() -> None:
    for rank, count, share, expected in [
        (128, 8, 0.8, (104, 3)),
        (24, 3, 0.8, (18, 2)),
        (10, 3, 0.8, (7, 1)),
        (5, 8, 0.8, (5, 0)),
        (9, 16, 0.0, (9, 0)),
        (12, 3, 0.0, (0, 4)),
        (12, 3, 1.0, (12, 0)),
    ]:
        assert split_directions(rank, count, share) == expected


def test_orthogonal_task_vectors_are_added_by_tsv_m() -> None:
    u, v = torch.linalg.qr(full(40, 40)[0]).Q, torch.linalg.qr(full(24, 24)[0]).Q
    parts = [LowRank(u[:, 3 * i : 3 * i + 3], 2.0 * v[3 * i : 3 * i + 3]) for i in range(3)]
    merged = call(TSV_M, parts, UNIT, TSV_M.config())
    assert apart(merged.dense(), sum(dense(part) for part in parts)) < 1e-6  # type: ignore[attr-defined]


def test_a_weight_of_zero_leaves_a_contribution_out() -> None:
    taus = full(24, 21, 4)
    for method in (TSV_M, ISO_C, ISO_CTS, KNOTS_TIES, OPCM):
        without = method(taus[[0, 1, 3]], torch.tensor([1.0, 3.0, 2.0]))
        found = method(taus, torch.tensor([1.0, 3.0, 0.0, 2.0]))
        torch.testing.assert_close(found, without)


def test_more_contributions_than_directions_still_count() -> None:
    """⌊min(m, n)/C⌋ would be zero, and the papers' int(3·(1/3)) trick fails at 49 already."""
    taus = full(4, 6, 9)
    merged_mn = TSV_M(taus)
    assert apart(merged_mn, torch.zeros_like(taus[0]) + 1e-9) > 1
    assert int(49 * (1 / 49)) == 0
    exact = full(49, 49, 49)
    u_pK = procrustes(torch.stack([torch.linalg.svd(tau)[0][:, 0] for tau in exact], 1))
    top = [torch.linalg.svd(tau) for tau in exact]
    v_Kq = procrustes(torch.stack([v[0] for _, _, v in top]))
    expected_mn = u_pK @ torch.stack([s[0] for _, s, _ in top]).diag() @ v_Kq
    assert apart(TSV_M(exact), expected_mn) < 1e-6


def product(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.b_mr.double() @ factors.a_rn.double()


def best(matrix_mn: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix_mn, full_matrices=False)
    return u[:, :rank] @ s[:rank].diag() @ v[:rank]


SPECTRAL = (TSV_M, ISO_C, ISO_CTS, KNOTS_TIES, OPCM)


def expected_changes(
    adapters: list[Adapter], start: Adapter | None, method: MergeMethod, weights: Sequence[float]
) -> dict[str, Tensor]:
    """The method on dense task vectors, before the recipe's scale."""
    modules = {}
    for name in adapters[0].lora:
        before = product(start.lora[name]) if start else 0.0
        modules[name] = [product(adapter.lora[name]) - before for adapter in adapters]
    weights_C = method.check_weights(torch.tensor(weights), len(weights))
    merged = method.merge_modules(modules, weights_C, method.config())
    return {name: change.double() for name, change in merged.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("method", SPECTRAL, ids=lambda method: method.name)
def test_adapters_of_unequal_ranks_merge_end_to_end(
    make_adapter: MakeAdapter, method: MergeMethod, with_start: bool
) -> None:
    adapters = [make_adapter(seed, rank=2 + seed) for seed in range(3)]
    start = make_adapter(9) if with_start else None
    changes = expected_changes(adapters, start, method, UNEVEN)
    recipe = Recipe(method=method.name, scale=0.7, weights=tuple(UNEVEN))
    result = merge(adapters, recipe, start=start)
    exact_recipe = recipe.model_copy(update={"refactor": Refactor(kind="stack")})
    stacked = merge(adapters, exact_recipe, start=start)
    for name, change_mn in changes.items():
        before_mn = product(start.lora[name]) if start else torch.zeros_like(change_mn)
        exact_mn = before_mn + 0.7 * change_mn
        found = result.adapter.lora[name]
        assert found.rank == 4
        if with_start or not method.name.startswith("iso"):
            assert apart(product(found), best(exact_mn, 4)) < 1e-4
        error = float((exact_mn - best(exact_mn, 4)).norm() / exact_mn.norm())
        assert result.report.truncation[name] == pytest.approx(error, rel=1e-4)
        assert apart(product(stacked.adapter.lora[name]), exact_mn) < 1e-4
    assert stacked.report.truncation == {}
    assert result.report.coefficients is None


@pytest.mark.parametrize("method", [ISO_C, ISO_CTS], ids=lambda method: method.name)
def test_isotropic_merges_choose_their_rank_before_all_directions_are_equal(
    make_adapter: MakeAdapter, method: MergeMethod
) -> None:
    """Of a flat spectrum an SVD keeps any r of K directions: the order of clients could decide."""
    adapters = [make_adapter(seed) for seed in range(3)]
    cut = merge(adapters, Recipe(method=method.name)).report
    assert cut.overall_truncation == pytest.approx((1 - 4 / 12) ** 0.5)
    recipe = Recipe(method=method.name, params={"rank": 4})
    kept = merge(adapters, recipe)
    turned = merge(adapters[::-1], recipe)
    assert kept.report.overall_truncation < 1e-6
    for name, factors in kept.adapter.lora.items():
        assert apart(product(turned.adapter.lora[name]), product(factors)) < 1e-5
    if method is ISO_C:
        for name, factors in kept.adapter.lora.items():
            total = sum(product(adapter.lora[name]) for adapter in adapters)
            assert apart(product(factors), naive_iso_c([total], [1.0], 4)) < 1e-5


def test_a_fresh_start_adds_no_empty_rank_to_a_stack(make_adapter: MakeAdapter) -> None:
    start = make_adapter(9)
    fresh = start.with_tensors(
        {k: t * (not k.endswith("lora_B")) for k, t in start.tensors().items()}
    )
    adapters = [make_adapter(seed) for seed in range(3)]
    recipe = Recipe(method="iso_c", refactor=Refactor(kind="stack"))
    merged = merge(adapters, recipe, start=fresh).adapter
    assert {factors.rank for factors in merged.lora.values()} == {12}


@pytest.mark.parametrize("method", [*SPECTRAL, LORA_LEGO], ids=lambda method: method.name)
def test_parameters_trained_in_full_follow_the_same_rules(
    make_adapter: MakeAdapter, method: MergeMethod
) -> None:
    start = make_adapter(9, head=True)
    adapters = [make_adapter(seed, head=True) for seed in range(3)]
    merged = merge(adapters, Recipe(method=method.name, scale=0.5), start=start).adapter
    changes = {
        name: torch.stack([adapter.dense[name] - start.dense[name] for adapter in adapters])
        for name in start.dense
    }
    moved = {name: (merged.dense[name] - start.dense[name]) / 0.5 for name in start.dense}
    if method.mean_norm:
        # Sums, brought to one norm over the whole model: only their ratio shows in the head.
        ratio = moved["head.bias"] / changes["head.bias"].sum(0)
        torch.testing.assert_close(ratio, ratio[:1].expand(3), atol=1e-4, rtol=1e-4)
        assert float(ratio[0]) < 1
        return
    torch.testing.assert_close(moved["head.bias"], changes["head.bias"].mean(0))
    weight = changes["head.weight"]
    expected_mn = MEAN(weight.flatten(1)).view(3, 24) if method is LORA_LEGO else method(weight)
    torch.testing.assert_close(moved["head.weight"], expected_mn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [*SPECTRAL, LORA_LEGO], ids=lambda method: method.name)
def test_task_vectors_merge_in_whatever_form_they_are(method: MergeMethod) -> None:
    factors = [LowRank(d.b_mk.float(), d.a_kn.float()) for d in low(40, 24)]
    vectors = [TaskVector({"m": d, "bias": d.a_kn[0]}) for d in factors]
    recipe = Recipe(method=method.name, scale=0.5, weights=tuple(UNEVEN))
    merged = merge_task_vectors(vectors, recipe).deltas
    assert isinstance(merged["m"], LowRank)
    if method is not OPCM:
        mean_D = sum(w * d.a_kn[0] for w, d in zip(UNEVEN, factors, strict=True)) / 6
        torch.testing.assert_close(merged["bias"], 0.5 * mean_D)
    mixed = [vectors[0], TaskVector({"m": factors[1].dense(), "bias": factors[1].a_kn[0]})]
    mixed.append(vectors[2])
    other = merge_task_vectors(mixed, recipe).deltas["m"]
    assert isinstance(other, Tensor)
    if method is LORA_LEGO:
        mean_mn = sum(w * d.dense() for w, d in zip(UNEVEN, factors, strict=True)) / 6
        torch.testing.assert_close(other, 0.5 * mean_mn)
    else:
        torch.testing.assert_close(merged["m"].dense(), other, atol=1e-4, rtol=1e-4)

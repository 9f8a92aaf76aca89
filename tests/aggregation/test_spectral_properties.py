"""What holds for every method that sees matrices, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.knots_ties import KnotsTiesConfig
from anabranch.vectors import LowRank

BY_NAME = {method.name: method for method in BUILT_IN if method.matrices is not None}
SYMMETRIC = sorted(set(BY_NAME) - {"opcm", "lora_lego"})
"""OPCM takes contributions as they come; which start of LEGO's clustering wins may depend on it."""
OF_PRODUCTS = sorted(set(BY_NAME) - {"lora_lego"})

Cohort = tuple[list[LowRank], Tensor]


@st.composite
def coarse(draw: st.DrawFn) -> Cohort:
    """Small whole numbers, so that zeros, equal task vectors and lost ranks do come up."""
    count, m, n = draw(st.integers(1, 5)), draw(st.integers(1, 7)), draw(st.integers(1, 7))

    def matrix(rows: int, columns: int) -> Tensor:
        numbers = draw(
            st.lists(st.integers(-2, 2), min_size=rows * columns, max_size=rows * columns)
        )
        return torch.tensor(numbers, dtype=torch.float32).view(rows, columns)

    ranks = [draw(st.integers(1, 3)) for _ in range(count)]
    deltas = [LowRank(matrix(m, rank), matrix(rank, n)) for rank in ranks]
    if draw(st.booleans()):
        deltas = [deltas[0]] * count
    weights = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    return deltas, torch.tensor(weights, dtype=torch.float64)


@st.composite
def general(draw: st.DrawFn) -> Cohort:
    """Random factors, with room for the directions of all."""
    count = draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    ranks = [draw(st.integers(1, 3)) for _ in range(count)]
    m, n = sum(ranks) + draw(st.integers(0, 20)), sum(ranks) + draw(st.integers(0, 20))
    deltas = [
        LowRank(
            torch.randn(m, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, n, generator=generator, dtype=torch.float64),
        )
        for rank in ranks
    ]
    weights = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    return deltas, torch.tensor(weights, dtype=torch.float64)


def merged(name: str, deltas: list[LowRank], weights_C: Tensor, config: object = None) -> Tensor:
    method = BY_NAME[name]
    config = config or method.config()
    found = method.merge_modules({"m": deltas}, weights_C, config)["m"]  # type: ignore[arg-type]
    assert isinstance(found, LowRank)
    return found.b_mk.double() @ found.a_kn.double()


def assert_near(one: Tensor, other: Tensor) -> None:
    scale = float(other.norm())
    torch.testing.assert_close(one, other, atol=1e-5 * max(scale, 1e-9), rtol=0)


@pytest.mark.parametrize("name", sorted(BY_NAME))
@settings(max_examples=25, deadline=None)
@given(cohort=coarse(), exponent=st.sampled_from([-15, 0, 15]))
def test_finite_in_finite_out_and_inputs_untouched(
    name: str, cohort: Cohort, exponent: int
) -> None:
    """Of any unit: ΔW and its square are far from 1."""
    deltas, weights_C = cohort
    scale = 10.0**exponent
    deltas = [LowRank(scale * delta.b_mk, scale * delta.a_kn) for delta in deltas]
    before = [(delta.b_mk.clone(), delta.a_kn.clone()) for delta in deltas]
    assert bool(merged(name, deltas, weights_C).isfinite().all())
    dense = torch.stack([delta.dense() for delta in deltas])
    kept = dense.clone()
    assert bool(BY_NAME[name](dense, weights_C).isfinite().all())
    assert torch.equal(dense, kept)
    for delta, (b_mk, a_kn) in zip(deltas, before, strict=True):
        assert torch.equal(delta.b_mk, b_mk)
        assert torch.equal(delta.a_kn, a_kn)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
@settings(max_examples=25, deadline=None)
@given(cohort=coarse())
def test_lost_ranks_merge_the_same_dense_and_in_the_core(name: str, cohort: Cohort) -> None:
    """Iso-CTS and KnOTS may cut or trim inside equal singular values, where either choice is right.

    So may TSV-M where it does not keep all directions.
    """
    deltas, weights_C = cohort
    config = BY_NAME[name].config(rank=7) if name == "tsv_m" else None
    dense = torch.stack([delta.dense() for delta in deltas])
    whole = BY_NAME[name](dense, weights_C, config)
    assert_near(merged(name, deltas, weights_C, config), whole.double())


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=12, deadline=None)
@given(cohort=general(), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(name: str, cohort: Cohort, shuffle: object) -> None:
    deltas, weights_C = cohort
    order = list(range(len(deltas)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    again = merged(name, [deltas[i] for i in order], weights_C[order])
    assert_near(again, merged(name, deltas, weights_C))


@pytest.mark.parametrize("name", OF_PRODUCTS)
@settings(max_examples=12, deadline=None)
@given(cohort=general(), seed=st.integers(0, 1000))
def test_only_the_product_of_the_factors_matters(name: str, cohort: Cohort, seed: int) -> None:
    """A → R·A, B → B·R⁻¹ leaves every ΔW as it is: the point of merging ΔW."""
    deltas, weights_C = cohort
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for delta in deltas:
        k = delta.rank
        noise_kk = torch.randn(k, k, generator=generator, dtype=torch.float64)
        r_kk = torch.linalg.qr(noise_kk).Q * torch.linspace(0.2, 3, k).double()
        turned.append(LowRank(delta.b_mk @ torch.linalg.inv(r_kk), r_kk @ delta.a_kn))
    assert_near(merged(name, turned, weights_C), merged(name, deltas, weights_C))


@pytest.mark.parametrize("name", sorted(set(OF_PRODUCTS) - {"knots_ties"}))
@settings(max_examples=12, deadline=None)
@given(cohort=general(), seed=st.integers(0, 1000))
def test_rotating_the_space_rotates_the_result(name: str, cohort: Cohort, seed: int) -> None:
    """What the core space rests on. KnOTS trims entries along n, so it turns on the left only."""
    deltas, weights_C = cohort
    m, n = deltas[0].shape
    generator = torch.Generator().manual_seed(seed)
    q_mm = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    p_nn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    turned = [LowRank(q_mm @ delta.b_mk, delta.a_kn @ p_nn) for delta in deltas]
    assert_near(merged(name, turned, weights_C), q_mm @ merged(name, deltas, weights_C) @ p_nn)


@pytest.mark.parametrize("name", ["tsv_m", "knots_ties", "opcm", "lora_lego"])
@settings(max_examples=12, deadline=None)
@given(cohort=general())
def test_equal_contributions_merge_to_themselves(name: str, cohort: Cohort) -> None:
    """The isotropic methods flatten the spectrum, of one task vector too."""
    deltas, weights_C = cohort
    config = KnotsTiesConfig(density=1.0) if name == "knots_ties" else None
    # Room for all directions of each, which TSV-M's ⌊min(m, n)/C⌋ is about.
    deltas = [deltas[0]] * min(len(deltas), min(deltas[0].shape) // deltas[0].rank)
    weights_C = weights_C[: len(deltas)]
    same_mn = deltas[0].b_mk @ deltas[0].a_kn
    assert_near(merged(name, deltas, weights_C, config), same_mn)


@pytest.mark.parametrize("name", OF_PRODUCTS)
@settings(max_examples=12, deadline=None)
@given(cohort=general())
def test_merging_keeps_scale(name: str, cohort: Cohort) -> None:
    deltas, weights_C = cohort
    larger = [LowRank(4 * delta.b_mk, delta.a_kn) for delta in deltas]
    assert_near(merged(name, larger, weights_C), 4 * merged(name, deltas, weights_C))


@pytest.mark.parametrize("name", sorted(BY_NAME))
@settings(max_examples=12, deadline=None)
@given(cohort=general())
def test_weights_are_relative(name: str, cohort: Cohort) -> None:
    deltas, weights_C = cohort
    assert_near(merged(name, deltas, 1000 * weights_C), merged(name, deltas, weights_C))


def test_lego_is_about_factors() -> None:
    """Turning the factors of one adapter leaves its ΔW, and changes what LEGO makes of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    deltas = [LowRank(draw(20, 3), draw(3, 15)) for _ in range(2)]
    turn_kk = torch.linalg.qr(draw(3, 3)).Q
    turned = [LowRank(deltas[0].b_mk @ turn_kk.T, turn_kk @ deltas[0].a_kn), deltas[1]]
    one = merged("lora_lego", deltas, torch.ones(2).double())
    other = merged("lora_lego", turned, torch.ones(2).double())
    assert float((one - other).norm() / one.norm()) > 0.1

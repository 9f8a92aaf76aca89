from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.engine.align import balanced_factors, rotation
from anabranch.aggregation.engine.refactor import low_rank_spectrum
from anabranch.vectors import LoraFactors, LowRank


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


LIKE = LoraFactors(torch.zeros(4, 20), torch.zeros(30, 4), alpha=8.0)


def factors_of(rank: int, seed: int = 0) -> LoraFactors:
    return LoraFactors(
        draw(rank, 20, seed=seed).float(), draw(30, rank, seed=seed + 1).float(), 8.0
    )


def product(factors: LoraFactors) -> Tensor:
    return factors.scaling * factors.b_mr.double() @ factors.a_rn.double()


def test_rotation_is_orthogonal_and_beats_every_other_one() -> None:
    b_mr, a_rn = draw(30, 4), draw(4, 20, seed=1)
    b_start, a_start = draw(30, 4, seed=2), draw(4, 20, seed=3)
    turn_rr = rotation(b_mr, a_rn, b_start, a_start)
    torch.testing.assert_close(turn_rr @ turn_rr.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close((b_mr @ turn_rr.T) @ (turn_rr @ a_rn), b_mr @ a_rn)

    def distance(r: Tensor) -> float:
        return float((r @ a_rn - a_start).square().sum() + (b_mr @ r.T - b_start).square().sum())

    for seed in range(50):
        other_rr = torch.linalg.qr(draw(4, 4, seed=seed)).Q
        assert distance(turn_rr) <= distance(other_rr)


def test_a_turned_start_is_turned_back() -> None:
    start = factors_of(4)
    turn_rr = torch.linalg.qr(draw(4, 4, seed=9)).Q.float()
    turned = LowRank(start.b_mr @ turn_rr.T, turn_rr @ start.a_rn)
    back_rr = rotation(
        turned.b_mk.double(), turned.a_kn.double(), start.b_mr.double(), start.a_rn.double()
    )
    torch.testing.assert_close((back_rr @ turned.a_kn.double()).float(), start.a_rn)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("inner", [1, 3, 4])
def test_alignment_and_filling_leave_the_product_and_no_dead_direction(
    align: bool, inner: int
) -> None:
    delta = LowRank(draw(30, inner).float(), draw(inner, 20, seed=1).float())
    found = balanced_factors(
        low_rank_spectrum(delta, 4), 4, LIKE, name="m", start=factors_of(4, seed=7), align=align
    )
    torch.testing.assert_close(product(found).float(), delta.dense(), atol=1e-5, rtol=1e-5)
    assert bool((found.a_rn.norm(dim=1) > 1e-3).all())


def test_alignment_brings_the_factors_closer_to_the_start() -> None:
    start = factors_of(4)
    moved = LowRank(start.b_mr * start.scaling + 0.01 * draw(30, 4).float(), start.a_rn)
    spectrum = low_rank_spectrum(moved, 4)

    def apart(factors: LoraFactors) -> float:
        return float((factors.a_rn - start.a_rn).norm() + (factors.b_mr - start.b_mr).norm())

    aligned = balanced_factors(spectrum, 4, start, name="m", start=start)
    free = balanced_factors(spectrum, 4, start, name="m", start=start, align=False)
    assert apart(aligned) < 0.5 * apart(free)


def test_no_change_at_all_keeps_the_starts_a() -> None:
    """Round 0 with nothing learnt: B stays zero, A stays alive."""
    start = LoraFactors(draw(4, 20).float(), torch.zeros(30, 4), 8.0)
    spectrum = low_rank_spectrum(LowRank(torch.zeros(30, 2), torch.ones(2, 20)), 4)
    found = balanced_factors(spectrum, 4, start, name="m", start=start)
    torch.testing.assert_close(found.a_rn, start.a_rn)
    assert not found.b_mr.any()


def test_without_a_start_dead_rows_are_drawn_from_the_name() -> None:
    spectrum = low_rank_spectrum(LowRank(draw(30, 2).float(), draw(2, 20).float()), 2)
    one = balanced_factors(spectrum, 6, LIKE, name="one")
    assert torch.equal(one.a_rn, balanced_factors(spectrum, 6, LIKE, name="one").a_rn)
    other = balanced_factors(spectrum, 6, LIKE, name="other")
    assert not torch.equal(one.a_rn[2:], other.a_rn[2:])
    assert float(one.a_rn[2:].abs().max()) <= 20**-0.5
    assert not one.b_mr[:, 2:].any()
    assert one.rank == 6
    assert one.scaling == LIKE.scaling


@pytest.mark.parametrize("rslora", [False, True])
def test_a_new_rank_keeps_the_scaling(rslora: bool) -> None:
    like = LoraFactors(torch.zeros(4, 20), torch.zeros(30, 4), 6.0, rslora)
    delta = LowRank(draw(30, 9).float(), draw(9, 20, seed=1).float())
    found = balanced_factors(low_rank_spectrum(delta, 9), 9, like, name="m")
    assert found.rslora is rslora
    assert found.scaling == pytest.approx(like.scaling)
    torch.testing.assert_close(product(found).float(), delta.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.a_rn.norm(dim=1), found.b_mr.norm(dim=0))


def test_alpha_of_zero_is_refused() -> None:
    like = LoraFactors(torch.zeros(4, 20), torch.zeros(30, 4), 0.0)
    spectrum = low_rank_spectrum(LowRank(draw(30, 2).float(), draw(2, 20).float()), 2)
    with pytest.raises(ValueError, match=r"module m: alpha is 0\.0"):
        balanced_factors(spectrum, 4, like, name="m")

"""Methods on angles, against their formulas on the vectors themselves in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.methods.karcher import KARCHER, KarcherConfig
from anabranch.aggregation.methods.model_stock import MODEL_STOCK
from anabranch.aggregation.methods.multi_slerp import MULTI_SLERP
from anabranch.aggregation.methods.slerp import SLERP, SlerpConfig
from anabranch.vectors import LowRank, TaskVector

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])


def deltas(count: int = 5, entries: int = 60, common: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    own_CD = torch.randn(count, entries, generator=generator)
    lengths_C = torch.linspace(0.5, 3, count)
    return (own_CD + common * torch.randn(entries, generator=generator)) * lengths_C[:, None]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_is_the_formula(count: int) -> None:
    deltas_CD = deltas(count).double()
    pairs = list(itertools.combinations(deltas_CD, 2))
    cosine = sum(torch.cosine_similarity(a, b, dim=0) for a, b in pairs) / len(pairs)
    t = count * cosine / (1 + (count - 1) * cosine)
    merged_D = MODEL_STOCK(deltas_CD.float(), WEIGHTS[:count])
    torch.testing.assert_close(merged_D, (t * deltas_CD.mean(0)).float())
    assert 0 < float(t) < 1


def test_model_stock_stays_at_the_base_when_contributions_disagree() -> None:
    """By the formula t would be −2 here: away from what the average says."""
    one_D = torch.tensor([1.0, 0.0])
    other_D = torch.tensor([-0.5, 0.75**0.5])
    assert torch.equal(MODEL_STOCK(torch.stack([one_D, other_D])), torch.zeros(2))
    assert torch.equal(MODEL_STOCK(torch.stack([one_D, -one_D])), torch.zeros(2))


def test_model_stock_returns_one_contribution_as_it_is() -> None:
    assert torch.equal(MODEL_STOCK(deltas(1)), deltas(1)[0])


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_is_the_arc(t: float) -> None:
    one_D, other_D = deltas(2).double()
    units_CD = torch.stack([one_D / one_D.norm(), other_D / other_D.norm()])
    merged_D = SLERP(units_CD.float(), None, SlerpConfig(t=t)).double()
    # On the unit sphere, at a share t of the arc, in the plane of the two.
    angle = (units_CD[0] @ units_CD[1]).acos()
    torch.testing.assert_close(merged_D.norm(), torch.tensor(1.0).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        (merged_D @ units_CD[0]).clamp(-1, 1).acos(), t * angle, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        (merged_D @ units_CD[1]).clamp(-1, 1).acos(), (1 - t) * angle, atol=1e-3, rtol=0
    )


def test_slerp_backwards_is_slerp_from_the_other_end() -> None:
    deltas_CD = deltas(2)
    forth_D = SLERP(deltas_CD, None, SlerpConfig(t=0.3))
    torch.testing.assert_close(SLERP(deltas_CD.flip(0), None, SlerpConfig(t=0.7)), forth_D)


@pytest.mark.parametrize("factor", [2.0, -2.0])
def test_slerp_is_a_straight_line_where_there_is_no_arc(factor: float) -> None:
    one_D = deltas(1)[0]
    merged_D = SLERP(torch.stack([one_D, factor * one_D]), None, SlerpConfig(t=0.25))
    torch.testing.assert_close(merged_D, (0.75 + 0.25 * factor) * one_D)


def test_slerp_takes_two() -> None:
    with pytest.raises(ValueError, match="between two contributions, there are 3; take karcher"):
        SLERP(deltas(3))


def test_multi_slerp_through_the_tangent_space() -> None:
    """mergekit's four steps, in fp64: the tangent mean is zero."""
    deltas_CD, shares_C = deltas().double(), WEIGHTS.double() / WEIGHTS.sum()
    lengths_C = deltas_CD.norm(dim=1)
    units_CD = deltas_CD / lengths_C[:, None]
    mean_D = shares_C @ units_CD
    mean_D = mean_D / mean_D.norm()
    tangents_CD = units_CD - (units_CD @ mean_D)[:, None] * mean_D
    assert float((shares_C @ tangents_CD).norm()) < 1e-14
    expected_D = mean_D * (shares_C @ lengths_C)
    torch.testing.assert_close(MULTI_SLERP(deltas_CD.float(), WEIGHTS), expected_D.float())


def naive_karcher(deltas_CD: Tensor, shares_C: Tensor, steps: int) -> Tensor:
    lengths_C = deltas_CD.norm(dim=1)
    units_CD = deltas_CD / lengths_C[:, None]
    mean_D = shares_C @ units_CD
    mean_D = mean_D / mean_D.norm()
    for _ in range(steps):
        tangent_D = torch.zeros_like(mean_D)
        for share, unit_D in zip(shares_C, units_CD, strict=True):
            angle = (unit_D @ mean_D).acos()
            tangent_D += share * angle / angle.sin() * (unit_D - angle.cos() * mean_D)
        arc = tangent_D.norm()
        mean_D = arc.cos() * mean_D + arc.sin() * tangent_D / arc
    return mean_D * (shares_C @ lengths_C)


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_karcher_is_the_iteration(steps: int, common: float) -> None:
    deltas_CD = deltas(common=common).double()
    config = KarcherConfig(iterations=steps, tolerance=1e-12)
    expected_D = naive_karcher(deltas_CD, WEIGHTS.double() / WEIGHTS.sum(), steps)
    merged_D = KARCHER(deltas_CD.float(), WEIGHTS, config)
    torch.testing.assert_close(merged_D, expected_D.float(), atol=1e-5, rtol=1e-5)


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    deltas_CD = deltas(2)
    units_CD = deltas_CD / deltas_CD.norm(dim=1, keepdim=True)
    middle_D = SLERP(units_CD, None, SlerpConfig(t=0.5)) * deltas_CD.norm(dim=1).mean()
    torch.testing.assert_close(KARCHER(deltas_CD), middle_D, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [MULTI_SLERP, KARCHER])
def test_directions_that_cancel_give_something_finite(method: object) -> None:
    one_D = deltas(1)[0]
    opposed_CD = torch.stack([one_D, -one_D, one_D, -one_D])
    merged_D = method(opposed_CD)  # type: ignore[operator]
    if method is MULTI_SLERP:
        assert torch.equal(merged_D, torch.zeros(60))
    else:
        # No mean direction: the iteration starts at the first, to which two have no one arc.
        torch.testing.assert_close(merged_D, one_D)
    unequal_CD = torch.stack([one_D, -2 * one_D])
    assert bool(method(unequal_CD, torch.tensor([1.0, 1.0])).isfinite().all())  # type: ignore[operator]


@pytest.mark.parametrize("method", [MULTI_SLERP, KARCHER, MODEL_STOCK])
def test_a_contribution_of_zeros_shortens_and_does_not_turn(method: object) -> None:
    deltas_CD = deltas(3)
    with_zero_CD = torch.cat([deltas_CD, torch.zeros(1, 60)])
    merged_D = method(with_zero_CD)  # type: ignore[operator]
    without_D = method(deltas_CD)  # type: ignore[operator]
    ratio = float(merged_D.norm() / without_D.norm())
    torch.testing.assert_close(merged_D, ratio * without_D)
    assert 0 < ratio < 1


@pytest.mark.parametrize("name", ["model_stock", "slerp", "multi_slerp", "karcher"])
def test_coefficients_differ_by_module_unless_the_scope_is_the_model(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    common = LowRank(draw(20, 2), draw(2, 10))
    vectors = [
        TaskVector(
            {
                "near": LowRank(common.b_mk + 0.1 * draw(20, 2), common.a_kn),
                "wide": LowRank(common.b_mk + 2.0 * draw(20, 2), common.a_kn),
            }
        )
        for _ in range(2)
    ]
    for scope in ("tensor", "model"):
        merged = merge_task_vectors(vectors, Recipe(method=name, params={"scope": scope}))
        # The stacked factors hold c_i·B_i, so the coefficients can be read off them.
        read = {
            module: [
                float(part.norm() / vector.deltas[module].b_mk.norm())
                for part, vector in zip(delta.b_mk.split(2, dim=1), vectors, strict=True)
            ]
            for module, delta in merged.deltas.items()
        }
        assert (read["near"] == pytest.approx(read["wide"], abs=1e-6)) is (scope == "model")

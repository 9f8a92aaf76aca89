"""Model Stock, SLERP, Multi-SLERP and Karcher against mergekit 0.1.5, and where they part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.methods.karcher import KARCHER, KarcherConfig
from anabranch.aggregation.methods.model_stock import MODEL_STOCK
from anabranch.aggregation.methods.multi_slerp import MULTI_SLERP
from anabranch.aggregation.methods.slerp import SLERP, SlerpConfig

WEIGHTS = [[1.0, 1, 1, 1], [0.1, 0.5, 2.0, 1.3]]
COMMON = [0.0, 1.0, 10.0]
"""How much the tensors have in common: from right angles to almost one direction."""


def oracle(tensors: list[Tensor], method: str, *, base: bool = True, **parameters: Any) -> Tensor:
    """Task vectors are models over a base of zero; without a base, they are the models."""
    zero = [torch.zeros_like(tensors[0])] if base else []
    return merge_tensors(
        [*zero, *tensors], method, parameters=parameters, base_index=0 if base else None
    )


def ours(method: MergeMethod, tensors: list[Tensor], config: Any = None, **given: Any) -> Tensor:
    return method(torch.stack(tensors), given.get("weights"), config)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def alike(tensors: list[Tensor], common: float) -> list[Tensor]:
    shared = torch.randn(23, 31, generator=torch.Generator().manual_seed(9))
    return [
        factor * (t + common * shared) for factor, t in zip((1, 0.3, 2, 1), tensors, strict=True)
    ]


@pytest.mark.parametrize("common", COMMON[1:])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_model_stock(tensors: list[Tensor], common: float, count: int) -> None:
    given = alike(tensors, common)[:count]
    assert_near(ours(MODEL_STOCK, given), oracle(given, "model_stock"))


def test_model_stock_of_equal_tensors_and_of_zeros(tensors: list[Tensor]) -> None:
    for given in ([tensors[0]] * 3, [torch.zeros(2, 3)] * 3, [tensors[0], torch.zeros(23, 31)]):
        assert_near(ours(MODEL_STOCK, given), oracle(given, "model_stock"))


def test_mergekits_model_stock_goes_the_other_way_when_angles_are_wide() -> None:
    """A known disagreement: of two at 120 degrees it returns −2 times the average."""
    given = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.75**0.5])]
    torch.testing.assert_close(oracle(given, "model_stock"), -(given[0] + given[1]))
    assert torch.equal(ours(MODEL_STOCK, given), torch.zeros(2))


def test_mergekits_model_stock_takes_small_task_vectors_for_orthogonal(
    tensors: list[Tensor],
) -> None:
    """A known disagreement: it divides by no less than 1e-6, so angles depend on the unit."""
    given = alike(tensors, 1.0)
    small = [1e-6 * tensor for tensor in given]
    found = ours(MODEL_STOCK, small)
    torch.testing.assert_close(found, 1e-6 * ours(MODEL_STOCK, given), atol=0, rtol=1e-4)
    assert float(oracle(small, "model_stock").norm()) < 0.1 * float(found.norm())


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp(tensors: list[Tensor], common: float, t: float) -> None:
    given = alike(tensors, common)[:2]
    expected = merge_tensors(given, "slerp", parameters={"t": t}, base_index=0)
    assert_near(ours(SLERP, given, SlerpConfig(t=t)), expected)


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0, 0.0])
def test_slerp_of_tensors_on_one_line(tensors: list[Tensor], factor: float) -> None:
    given = [tensors[0], factor * tensors[0]]
    expected = merge_tensors(given, "slerp", parameters={"t": 0.3}, base_index=0)
    assert_near(ours(SLERP, given, SlerpConfig(t=0.3)), expected)


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_multi_slerp(tensors: list[Tensor], weights: list[float], common: float) -> None:
    given = alike(tensors, common)
    expected = oracle(given, "multislerp", weight=weights)
    assert_near(ours(MULTI_SLERP, given, weights=torch.tensor(weights)), expected)


def test_multi_slerp_of_one_and_of_equal_and_with_zeros(tensors: list[Tensor]) -> None:
    for given in (tensors[:1], [tensors[0]] * 4, [*tensors[:2], torch.zeros(23, 31)]):
        assert_near(ours(MULTI_SLERP, given), oracle(given, "multislerp", weight=1.0))


def test_multi_slerp_of_opposite_tensors(tensors: list[Tensor]) -> None:
    """Agreed for two. A known disagreement for more: mergekit raises, this is the mean."""
    two = [tensors[0], -tensors[0]]
    assert_near(ours(MULTI_SLERP, two), oracle(two, "multislerp", weight=1.0))
    four = [tensors[0], -tensors[0], tensors[1], -tensors[1]]
    with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
        oracle(four, "multislerp", weight=1.0)
    assert_near(ours(MULTI_SLERP, four), torch.zeros(23, 31))


def test_mergekits_multi_slerp_turns_rounding_into_a_direction(tensors: list[Tensor]) -> None:
    """A known disagreement: τ and −3τ cancel up to rounding, which it scales up to full length."""
    two = [tensors[0], -3 * tensors[0]]
    theirs, found = oracle(two, "multislerp", weight=1.0), ours(MULTI_SLERP, two)
    assert_near(found, -tensors[0])
    assert float(theirs.norm()) > float(tensors[0].norm())
    # Not even on the line on which the two lie.
    assert abs(float(torch.cosine_similarity(theirs.flatten(), found.flatten(), dim=0))) < 0.95


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_karcher(tensors: list[Tensor], common: float, iterations: int) -> None:
    given = alike(tensors, common)
    expected = oracle(given, "karcher", base=False, max_iter=iterations)
    assert_near(ours(KARCHER, given, KarcherConfig(iterations=iterations)), expected)


def test_karcher_of_one_and_of_equal_and_with_zeros(tensors: list[Tensor]) -> None:
    zero = torch.zeros(23, 31)
    for given in (tensors[:1], [tensors[0]] * 4, [*tensors[:2], zero], [zero] * 3):
        assert_near(ours(KARCHER, given), oracle(given, "karcher", base=False))


def test_mergekits_karcher_leaves_small_task_vectors_out(tensors: list[Tensor]) -> None:
    """A known disagreement: a length up to 1e-5 counts as zero there, so the unit matters."""
    small = [1e-7 * tensor for tensor in alike(tensors, 1.0)]
    assert torch.equal(oracle(small, "karcher", base=False), torch.zeros(23, 31))
    found = 1e7 * ours(KARCHER, small)
    assert_near(found, oracle(alike(tensors, 1.0), "karcher", base=False))


@pytest.mark.parametrize("method", [SLERP, KARCHER, MULTI_SLERP], ids=lambda method: method.name)
def test_on_adversarial_tensors(adversarial: list[Tensor], method: MergeMethod) -> None:
    """To 1e-5 of the largest, mergekit in fp64: where all but cancel, its fp32 is rounding."""
    given = [adversarial[0], adversarial[-1]] if method is SLERP else adversarial
    wide = [tensor.double() for tensor in given]
    found = ours(method, given).double()
    if method is SLERP:
        expected = merge_tensors(wide, "slerp", parameters={"t": 0.5}, base_index=0)
    elif method is KARCHER:
        expected = oracle(wide, "karcher", base=False)
    elif bool(found.any()):
        expected = oracle(wide, "multislerp", weight=1.0)
    else:
        # A known disagreement: zeros and what cancels have no direction to go from there.
        with pytest.raises(ValueError, match="weighted sum of the input tensors is zero"):
            oracle(wide, "multislerp", weight=1.0)
        expected = torch.zeros_like(found)
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / largest, expected / largest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 1.3]])
def test_nuslerp_is_slerp(tensors: list[Tensor], common: float, weights: list[float]) -> None:
    """Over whole tensors, its way here; t is the second one's share of the weights."""
    given = alike(tensors, common)[:2]
    config = SlerpConfig(t=weights[1] / sum(weights))
    assert_near(ours(SLERP, given, config), oracle(given, "nuslerp", weight=weights))


def test_mergekits_nuslerp_follows_the_arc_where_its_slerp_is_straight(
    tensors: list[Tensor],
) -> None:
    """A known disagreement: beyond a cosine of .9995 its two part, and ours is its slerp."""
    opposite = [tensors[0], tensors[1] * 1e-3 - tensors[0]]
    straight = merge_tensors(opposite, "slerp", parameters={"t": 0.3}, base_index=0)
    assert_near(ours(SLERP, opposite, SlerpConfig(t=0.3)), straight)
    theirs = oracle(opposite, "nuslerp", weight=[0.7, 0.3])
    assert float(theirs.norm()) > 2 * float(straight.norm())

"""Against the merging functions of PEFT 0.21 on tensors."""

from __future__ import annotations

import peft.utils.merge_utils as oracle
import pytest
import torch
from torch import Tensor

from anabranch.aggregation.methods.breadcrumbs import BREADCRUMBS, BreadcrumbsConfig
from anabranch.aggregation.methods.dare_linear import DareConfig, dare_linear
from anabranch.aggregation.methods.dare_ties import dare_ties
from anabranch.aggregation.methods.task_arithmetic import task_arithmetic
from anabranch.aggregation.methods.ties import TIES, TiesConfig

UNIT = torch.ones(4)
UNEVEN = torch.tensor([0.1, 0.5, 2.0, 1.3])


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("weights_C", [UNIT, UNEVEN, torch.tensor([1.0, -1, 0.5, 0])])
def test_task_arithmetic(tensors: list[Tensor], weights_C: Tensor) -> None:
    expected = oracle.task_arithmetic(tensors, weights_C)
    found = task_arithmetic(flat(tensors), weights_C).view(23, 31)
    assert_near(found, expected)


def test_task_arithmetic_of_adversarial_tensors(adversarial: list[Tensor]) -> None:
    weights_C = UNEVEN[: len(adversarial)]
    expected = oracle.task_arithmetic(adversarial, weights_C)
    assert_near(task_arithmetic(flat(adversarial), weights_C).view(23, 31), expected)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.53])
def test_ties_at_unit_weights(distinct: list[Tensor], density: float) -> None:
    """Of zeros it counts none of its own sign, as here: both divide by those that agree."""
    weights_C = torch.ones(len(distinct))
    expected = oracle.ties(distinct, weights_C, density)
    found = TIES(flat(distinct), weights_C, TiesConfig(density=density)).view(23, 31)
    assert_near(found, expected)


@pytest.mark.filterwarnings("ignore:The density 1")
def test_ties_that_trims_nothing(adversarial: list[Tensor]) -> None:
    weights_C = torch.ones(len(adversarial))
    expected = oracle.ties(adversarial, weights_C, 1.0)
    assert_near(TIES(flat(adversarial), weights_C, TiesConfig(density=1)).view(23, 31), expected)


def test_a_density_of_zero_is_nothing_there(tensors: list[Tensor]) -> None:
    """A known disagreement: here it is refused. Dropping all at random is even 0/0 there."""
    assert not bool(oracle.ties(tensors, UNIT, 0.0).any())
    assert not bool(oracle.magnitude_prune(tensors, UNIT, 0.0).any())
    assert bool(oracle.dare_linear(tensors, UNIT, 0.0).isnan().all())
    for config in (TiesConfig, DareConfig, BreadcrumbsConfig):
        with pytest.raises(ValueError, match="greater than 0"):
            config(density=0)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.53])
def test_magnitude_prune_is_breadcrumbs_without_outliers(
    distinct: list[Tensor], density: float
) -> None:
    """A sum there, a mean here: they differ by the sum of the weights."""
    weights_C = UNEVEN[: len(distinct)]
    expected = oracle.magnitude_prune(distinct, weights_C, density)
    config = BreadcrumbsConfig(density=density, gamma=0)
    found = BREADCRUMBS(flat(distinct), weights_C, config) * weights_C.sum()
    assert_near(found.view(23, 31), expected)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_an_election_by_count_is_another_method(
    tensors: list[Tensor], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's ``frequency``: one contribution, one vote, whatever its size. Not offered here."""
    monkeypatch.setattr(oracle.torch, "bernoulli", lambda p: torch.ones_like(p))
    by_size, by_count = (
        getattr(oracle, method)(tensors, UNIT, 0.5, majority_sign_method=way)
        for way in ("total", "frequency")
    )
    assert float((by_size.sign() != by_count.sign()).float().mean()) > 0.05


def test_ties_at_other_weights_is_another_method(tensors: list[Tensor]) -> None:
    """A known disagreement: PEFT elects before it weighs and divides by the count."""
    expected = oracle.ties(tensors, UNEVEN, 0.5)
    found = TIES(flat(tensors), UNEVEN, TiesConfig(density=0.5)).view(23, 31)
    assert bool((found.sign() != expected.sign()).any())
    agree = (found.sign() == expected.sign()) & (found != 0)
    assert not torch.allclose(found[agree], expected[agree], rtol=0.1)


def test_the_papers_code_keeps_one_entry_more() -> None:
    """A known disagreement: |τ| ≥ kthvalue(d − int(dK)) keeps int(dK) + 1 entries."""
    delta_D = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    reference = delta_D.abs() >= delta_D.abs().kthvalue(1000 - int(1000 * 0.2)).values
    ours = TIES(delta_D[None], torch.ones(1), TiesConfig(density=0.2))
    assert (int(reference.sum()), int((ours != 0).sum())) == (201, 200)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_with_its_masks_injected(
    adversarial: list[Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's dare_linear is a sum, ours a mean: at unit weights they differ by their number."""
    density, count = 0.37, len(adversarial)
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(23, 31, generator=generator) < density for _ in adversarial]
    remaining = iter(masks)
    monkeypatch.setattr(oracle.torch, "bernoulli", lambda p: next(remaining).to(p.dtype))
    expected = getattr(oracle, name)(adversarial, torch.ones(count), density)
    merge_entries = dare_linear if name == "dare_linear" else dare_ties
    found = merge_entries(
        flat(adversarial), torch.ones(count), DareConfig(density=density), keep_CD=flat(masks)
    ).view(23, 31)
    assert_near(found * count if name == "dare_linear" else found, expected)

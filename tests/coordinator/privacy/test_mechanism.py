"""The mechanism: no update counts for more than the clip, sums are exact, noise is what is said."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from anabranch.coordinator.privacy.mechanism import (
    clip_factor,
    grid_step,
    in_steps,
    private_mean,
)
from anabranch.coordinator.privacy.noise import noise_source


def counted(change: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    """What of an update enters the sum."""
    step = grid_step(clip, sum(part.numel() for part in change.values()))
    factor = clip_factor(change, clip)
    return {name: in_steps(part, factor, step) * step for name, part in change.items()}


def norm(change: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in change.values()))


@pytest.mark.parametrize("size", [1e-3, 0.499 / 15.5, 0.5 / 15.5, 1.0, 1e6, 1e30])
def test_no_update_counts_for_more_than_the_clip(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    change = {n: size * torch.randn(40, 3, generator=generator) for n in "ab"}
    assert norm(counted(change, 0.5)) <= 0.5
    if norm(change) > 0.5:
        assert norm(counted(change, 0.5)) == pytest.approx(0.5, rel=1e-3)
    else:
        assert norm(counted(change, 0.5)) == pytest.approx(norm(change), rel=1e-2)


def test_rounding_to_the_grid_cannot_lift_an_update_over_the_clip() -> None:
    """Every entry lies just above half a step, so that all are rounded up."""
    step = grid_step(1.0, 10_000)
    for steps in (0.5001, 900.5001, 1023.5001, 2047.5001):
        change = {"a": torch.full((100, 100), step * steps)}
        assert norm(counted(change, 1.0)) <= 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_update_that_is_not_finite_counts_as_zeros(bad: float) -> None:
    broken = {"a": torch.tensor([1.0, bad])}
    sound = {"a": torch.tensor([0.1, 0.2])}
    alone = private_mean([sound], 0.5, 1.0, 2, noise_source(1, 1))["a"]
    assert torch.equal(private_mean([broken, sound], 0.5, 1.0, 2, noise_source(1, 1))["a"], alone)


def test_the_mean_is_of_clipped_changes_over_a_fixed_number_plus_noise() -> None:
    changes = [{"a": torch.full((2, 2), 10.0)}, {"a": torch.full((2, 2), 0.01)}]
    tiny = private_mean(changes, 0.5, 1e-9, 4, noise_source(1, 1))["a"]
    assert torch.allclose(tiny, torch.full((2, 2), (0.25 + 0.01) / 4), rtol=2e-3)
    nothing = {"a": torch.zeros(200_000), "b": torch.zeros(())}
    noisy = private_mean([nothing], 0.5, 3.0, 4, noise_source(2, 1))
    assert noisy["b"].shape == ()
    spread = float(noisy["a"].std())
    # The standard error of a standard deviation of 200,000 draws is 0.16%.
    assert spread == pytest.approx(0.5 * 3.0 / 4, rel=0.01)
    assert abs(float(noisy["a"].mean())) < 5 * spread / math.sqrt(200_000)
    sizes = np.abs(noisy["a"].numpy()) / spread
    assert (sizes > 1.96).mean() == pytest.approx(0.05, abs=0.003)


def test_what_comes_out_are_whole_steps_whatever_the_updates_lowest_bits_are() -> None:
    """An answer's lowest bits must not tell which sums were possible (Mironov, 2012)."""
    generator = torch.Generator().manual_seed(4)
    changes = [{"a": 0.01 * torch.randn(500, generator=generator)} for _ in range(3)]
    answer = private_mean(changes, 0.5, 2.0, 4, noise_source(3, 1))["a"].double()
    steps = answer * 4 / grid_step(0.5, 500)
    assert torch.equal(steps, steps.round())
    # The order of the clients cannot show either: whole numbers add up alike.
    other = private_mean(changes[::-1], 0.5, 2.0, 4, noise_source(3, 1))["a"]
    assert torch.equal(other, answer.float())

"""Triggers that are searched for: a linear model, where the best one is known."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from anabranch.aggregation.backdoor.calibration import Batch, ModelCalibration
from anabranch.aggregation.backdoor.triggers import TriggerConfig, search_triggers


def linear(weight: torch.Tensor) -> ModelCalibration:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    inputs = torch.randn(400, weight.shape[1], generator=torch.Generator().manual_seed(0))
    return ModelCalibration(model.eval().requires_grad_(False), {"task": Batch(inputs)}, "own")


def test_of_two_classes_it_finds_the_direction_between_them() -> None:
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    calibration = linear(weight)
    config = TriggerConfig(size=0.8, batch_size=100, steps=200)
    triggers = {one.target: one for one in search_triggers(calibration, {}, config)}
    best = nn.functional.normalize(weight[1] - weight[0], dim=0)
    inputs = calibration.batch("task", 0, 100).inputs_NX
    bound = 0.8 * float(inputs.norm(dim=1).square().mean().sqrt())
    for target, sign in ((1, 1.0), (0, -1.0)):
        pattern = triggers[target].pattern_X
        assert float(pattern.norm()) <= bound * (1 + 1e-5)
        assert float(nn.functional.cosine_similarity(pattern, sign * best, dim=0)) > 0.9
        # What it reaches is what the known best one reaches, on inputs that it has not seen.
        unseen = calibration.batch("task", 1, 100).inputs_NX
        others = (unseen @ weight.T).argmax(1) != target
        known = ((unseen + sign * bound * best) @ weight.T).argmax(1) == target
        share = float((known & others).sum() / others.sum())
        assert triggers[target].rate == pytest.approx(share, abs=0.06)


def test_a_trigger_stays_where_it_may_be() -> None:
    weight = torch.zeros(3, 10)
    weight[2, -1] = 30.0
    weight[:2, :5] = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    calibration = linear(weight)
    patch = {"task": torch.tensor([0.0] * 8 + [1.0] * 2)}
    config = TriggerConfig(size=2.0, targets=(2,))
    (inside,) = search_triggers(calibration, {}, config, where=patch)
    assert not inside.pattern_X[:8].any()
    assert inside.rate > 0.9
    elsewhere = {"task": torch.tensor([0.0] * 5 + [1.0] * 4 + [0.0])}
    (outside,) = search_triggers(calibration, {}, config, where=elsewhere)
    assert outside.rate == 0.0


def test_values_are_looked_at_and_the_seed_decides() -> None:
    calibration = linear(torch.zeros(2, 6))
    head = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    config = TriggerConfig(batch_size=50, size=1.0)
    plain = search_triggers(calibration, {}, config)
    found = search_triggers(calibration, {}, config, values={"weight": head})
    again = search_triggers(calibration, {}, config, values={"weight": head})
    assert plain[0].rate == 0.0
    assert [one.rate for one in found] == [one.rate for one in again]
    assert found[0].rate > 0.5
    assert found[0].rate >= found[1].rate


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"size": 0}, {"steps": 0}, {"batch_size": 1}, {"learning_rate": -1.0}):
        with pytest.raises(ValidationError):
            TriggerConfig.model_validate(wrong)

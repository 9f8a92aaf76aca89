"""Merges that learn, on a classifier that was really trained and really backdoored."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anabranch.aggregation import merge_on_data
from anabranch.aggregation.backdoor.calibration import Batch, ModelCalibration
from anabranch.aggregation.backdoor.config import MaskingConfig
from anabranch.aggregation.backdoor.dam import Around, learn
from anabranch.aggregation.backdoor.masking import blend, entropy
from anabranch.vectors import Adapter, LoraFactors, task_vector


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


toy = _beside("backdoored")

DEFENDING = {
    "data": "own",
    "wanted": "consistency",
    "inner_lr": 0.0,
    "coefficient": 0.2,
    "clamp": False,
    "perturbation_norm": 3.0,
    "perturbation_lr": 0.1,
    "perturbation_weight": 1.0,
    "mask_lr": 0.1,
    "mask_steps": 150,
    "coefficient_steps": 30,
    "batch_size": 32,
}
"""Chosen on worlds of other seeds (0 to 2) than those that are tested."""


@pytest.fixture(scope="module")
def worlds() -> list[Any]:
    """Of seeds 10 to 13, those whose plain average is backdoored on more than a fifth."""
    return [toy.world(10), toy.world(13)]


def own(world: Any, **changes: Any) -> ModelCalibration:
    given = {"examples": {"task": Batch(world.unlabelled_NF)}, "source": "own", **changes}
    return ModelCalibration(world.base, **given)


def quick(**changes: Any) -> MaskingConfig:
    return MaskingConfig.model_validate(
        {"data": "own", "mask_steps": 3, "coefficient_steps": 3, "batch_size": 8, **changes}
    )


@pytest.mark.parametrize("rule", ["dam", "dam_two_masks"])
def test_triggers_work_less_than_in_a_plain_average(worlds: list[Any], rule: str) -> None:
    """On the mean over worlds at most half as often, for at most five points of accuracy."""
    before, after = [], []
    for world in worlds:
        average = toy.averaged(world.adapters)
        assert world.accuracy(average) > 0.95
        assert world.attack_success(average) > 0.2
        config = MaskingConfig.model_validate({**DEFENDING, "rule": rule})
        result = merge_on_data(world.adapters, config, own(world))
        merged = toy.changes_of(result.adapter)
        assert world.accuracy(merged) > world.accuracy(average) - 0.05
        before.append(world.attack_success(average))
        after.append(world.attack_success(merged))
        assert 0 < result.truncation["hidden"] < 0.6
        assert len(result.losses) == 180
    assert sum(after) < 0.5 * sum(before), (before, after)


def test_coefficients_follow_the_entropy_as_a_naive_loop_does(worlds: list[Any]) -> None:
    world = worlds[0]
    calibration = own(world)
    config = quick(rule="adamerging", coefficient_steps=5, coefficient_lr=0.02)
    vectors = [task_vector(adapter) for adapter in world.adapters]
    learned = learn(blend(vectors), config, Around(calibration))
    changes = [toy.changes_of(adapter) for adapter in world.adapters]
    coefficients = torch.full((2, 5), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], 0.02)
    for step in range(5):
        batch = calibration.batch("task", step, 8)
        merged = {
            module: sum(coefficients[row, c] * changes[c][module] for c in range(5))
            for row, module in enumerate(("hidden", "output"))
        }
        loss = entropy(calibration.logits("task", batch, merged, {}))  # type: ignore[arg-type]
        assert learned.losses[step] == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(learned.coefficients_MC, coefficients.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["adamerging", "concrete", "dam", "dam_two_masks"])
def test_the_seed_decides_and_every_step_is_told(worlds: list[Any], rule: str) -> None:
    world = worlds[0]
    told: list[tuple[int, int]] = []
    config = quick(rule=rule)
    first = merge_on_data(
        world.adapters, config, own(world), progress=lambda done, total: told.append((done, total))
    )
    steps = 3 if rule == "adamerging" else 6
    assert told == [(step + 1, steps) for step in range(steps)]
    assert merge_on_data(world.adapters, config, own(world)).adapter.hash() == first.adapter.hash()
    other = merge_on_data(world.adapters, quick(rule=rule, seed=1), own(world, seed=1))
    assert other.adapter.hash() != first.adapter.hash()
    assert (first.kept == {}) == (rule == "adamerging")


def test_without_steps_it_is_the_sum_at_the_first_coefficients(worlds: list[Any]) -> None:
    world = worlds[0]
    config = quick(rule="adamerging", coefficient_steps=0, coefficient=0.2)
    learned = learn(blend([task_vector(a) for a in world.adapters]), config, Around(own(world)))
    for module, average in toy.averaged(world.adapters).items():
        torch.testing.assert_close(learned.changes[module], average)


def test_a_start_and_parameters_in_full_are_added_to(worlds: list[Any]) -> None:
    """The model that is looked at is base + start + merged change, heads and all."""
    world = worlds[0]
    head = world.base.get_parameter("output.weight")
    generator = torch.Generator().manual_seed(0)

    def adapter(seed: int) -> Adapter:
        draw = torch.Generator().manual_seed(seed)
        factors = LoraFactors(
            torch.randn(4, 24, generator=draw) / 5, torch.randn(48, 4, generator=draw) / 9, 4.0
        )
        moved = head + 0.1 * torch.randn(head.shape, generator=draw)
        return Adapter({"hidden": factors}, {"output.weight": moved})

    start, ends = adapter(0), [adapter(1), adapter(2)]
    seen: list[Tensor] = []

    class Watching(ModelCalibration):
        def logits(
            self,
            task: str,
            batch: Batch,
            changes: Mapping[str, Tensor],
            values: Mapping[str, Tensor],
        ) -> Tensor:
            seen.append(changes["hidden"].detach())
            seen.append(values["output.weight"].detach())
            return super().logits(task, batch, changes, values)

    config = quick(rule="adamerging", coefficient=0.5, coefficient_steps=1, coefficient_lr=1e-9)
    examples = {"task": Batch(torch.randn(8, 24, generator=generator))}
    result = merge_on_data(ends, config, Watching(world.base, examples, "own"), start=start)
    mean = sum(end.lora["hidden"].delta().dense() for end in ends) / 2
    torch.testing.assert_close(seen[0], mean)
    heads = sum(end.dense["output.weight"] for end in ends) / 2
    torch.testing.assert_close(seen[1], heads)
    torch.testing.assert_close(result.adapter.dense["output.weight"], heads)
    u, s, v = torch.linalg.svd(mean)
    best = (u[:, :4] * s[:4]) @ v[:4]
    torch.testing.assert_close(
        result.adapter.lora["hidden"].delta().dense(), best, atol=1e-4, rtol=1e-3
    )


class Reader(nn.Module):
    """Text as it is looked at: embedded tokens and a mask, pooled and classified."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, attention_mask: Tensor, inputs_embeds: Tensor) -> Tensor:
        weights = attention_mask[..., None].float()
        pooled = (self.mixer(inputs_embeds).relu() * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(pooled)
        return logits


def test_text_is_perturbed_where_it_is_embedded() -> None:
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(20, 5, 6, generator=generator)
    mask = torch.ones(20, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    calibration = ModelCalibration(
        Reader().eval(),
        {
            "a": Batch(embedded, {"attention_mask": mask}),
            "b": Batch(embedded + 1, {"attention_mask": mask}),
        },
        "public",
        keyword="inputs_embeds",
    )  # fmt: skip
    adapters = [
        Adapter({
            "mixer": LoraFactors(
                torch.randn(2, 6, generator=generator), torch.randn(6, 2, generator=generator), 2.0
            )
        })
        for _ in range(3)
    ]  # fmt: skip
    config = quick(rule="dam", data="public", perturbation_norm=0.5, perturbation_lr=0.3)
    result = merge_on_data(adapters, config, calibration)
    assert len(result.losses) == 6
    assert 0 < result.kept["mixer"] < 1


def test_no_data_no_rule_that_needs_some(worlds: list[Any]) -> None:
    world = worlds[0]
    for rule in ("adamerging", "concrete", "dam", "dam_two_masks"):
        with pytest.raises(ValueError, match=f"{rule} learns on .* inputs, and data is none"):
            merge_on_data(world.adapters, MaskingConfig(rule=rule), own(world))  # type: ignore[arg-type]


def test_other_data_than_agreed_is_refused(worlds: list[Any]) -> None:
    world = worlds[0]
    with pytest.raises(ValueError, match="these are test inputs"):
        merge_on_data(world.adapters, quick(), own(world, split="test"))
    with pytest.raises(ValueError, match=r"public validation inputs, and .* says own"):
        merge_on_data(world.adapters, quick(), own(world, source="public"))
    with pytest.raises(ValueError, match="split"):
        quick(split="test")
    with pytest.raises(ValueError, match="call eval"):
        ModelCalibration(nn.Linear(2, 2), {"task": Batch(torch.zeros(1, 2))}, "own")
    with pytest.raises(ValueError, match="has no inputs"):
        own(world, examples={"task": Batch(torch.zeros(0, 24))})


def test_a_loss_that_is_not_finite_stops_it(worlds: list[Any]) -> None:
    world = worlds[0]
    poisoned = own(world, examples={"task": Batch(torch.full((4, 24), float("inf")))})
    with pytest.raises(RuntimeError, match="the loss is nan at step 0"):
        merge_on_data(world.adapters, quick(rule="adamerging"), poisoned)


def test_a_base_inside_another_model_is_found_by_its_prefix() -> None:
    inner, generator = Reader().eval(), torch.Generator().manual_seed(0)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = inner

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.encoder(attention_mask, inputs_embeds)
            return logits

    batch = Batch(torch.randn(4, 5, 6, generator=generator), {"attention_mask": torch.ones(4, 5)})
    changes = {"mixer": torch.randn(6, 6, generator=generator)}
    values = {"head.bias": torch.randn(3, generator=generator)}
    plain = ModelCalibration(inner, {"t": batch}, "own", keyword="inputs_embeds")
    inside = ModelCalibration(
        Wrapped().eval(), {"t": batch}, "own", keyword="inputs_embeds", prefix="encoder."
    )
    wanted = plain.logits("t", batch, changes, values)
    torch.testing.assert_close(inside.logits("t", batch, changes, values), wanted)
    assert not torch.allclose(wanted, plain.logits("t", batch, {}, {}))

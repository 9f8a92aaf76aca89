"""Against PEFT 0.21: its merging functions on tensors, and its adapters merged into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft.utils.merge_utils as oracle
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel

from anabranch.aggregation import Recipe, merge
from anabranch.aggregation.methods.dare_linear import DareConfig, dare_linear
from anabranch.aggregation.methods.dare_ties import dare_ties
from anabranch.aggregation.methods.task_arithmetic import task_arithmetic
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter, write_adapter

UNIT = torch.ones(4)
UNEVEN = torch.tensor([0.1, 0.5, 2.0, 1.3])


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("weights_C", [UNIT, UNEVEN, torch.tensor([1.0, -1, 0.5, 0])])
def test_task_arithmetic(tensors: list[Tensor], weights_C: Tensor) -> None:
    expected = oracle.task_arithmetic(tensors, weights_C)
    found = task_arithmetic(flat(tensors), weights_C).view(23, 31)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.53])
def test_ties_at_unit_weights(tensors: list[Tensor], density: float) -> None:
    expected = oracle.ties(tensors, UNIT, density)
    found = TIES(flat(tensors), UNIT, TiesConfig(density=density)).view(23, 31)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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
    tensors: list[Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's dare_linear is a sum, ours a mean: at unit weights they differ by their number."""
    density = 0.37
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(23, 31, generator=generator) < density for _ in tensors]
    remaining = iter(masks)
    monkeypatch.setattr(oracle.torch, "bernoulli", lambda p: next(remaining).to(p.dtype))
    expected = getattr(oracle, name)(tensors, UNIT, density)
    merge_entries = dare_linear if name == "dare_linear" else dare_ties
    found = merge_entries(
        flat(tensors), UNIT, DareConfig(density=density), keep_CD=flat(masks)
    ).view(23, 31)
    if name == "dare_linear":
        found = found * 4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


NAMES = ("one", "two", "three")
MIX = (0.2, 0.5, 0.9)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """Three adapters of different ranks and alphas on one random base."""
    torch.manual_seed(0)
    base = BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=20,
        )
    )
    configs = [
        LoraConfig(r=2 + i, lora_alpha=4 + 3 * i, target_modules=["query", "value"])
        for i in range(3)
    ]
    wrapped = get_peft_model(base, configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:], strict=True):
        wrapped.add_adapter(name, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return wrapped


@pytest.fixture(scope="module")
def adapters(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder)
    return [read_adapter(folder / name) for name in NAMES]


def deltas(model: PeftModel, adapter: str) -> Mapping[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_concatenation_is_stacking(model: PeftModel, adapters: list[Adapter]) -> None:
    model.add_weighted_adapter(list(NAMES), list(MIX), "cat", combination_type="cat")
    recipe = Recipe(method="task_arithmetic", weights=MIX, refactor=Refactor(kind="stack"))
    merged = merge(adapters, recipe).adapter
    for name, expected in deltas(model, "cat").items():
        torch.testing.assert_close(
            merged.lora[name].delta().dense(), expected, atol=1e-5, rtol=1e-5
        )
        assert merged.lora[name].rank == 2 + 3 + 4


@pytest.mark.parametrize("rank", [2, 4])
def test_the_svd_of_stacked_factors_is_the_svd_of_the_sum(
    model: PeftModel, adapters: list[Adapter], rank: int
) -> None:
    model.add_weighted_adapter(
        list(NAMES), list(MIX), f"svd{rank}", combination_type="svd", svd_rank=rank
    )
    recipe = Recipe(method="task_arithmetic", weights=MIX, refactor=Refactor(rank=rank))
    result = merge(adapters, recipe)
    for name, expected in deltas(model, f"svd{rank}").items():
        found = result.adapter.lora[name].delta().dense()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert 0.01 < result.report.truncation[name] < 1


def test_ties_on_the_product_is_pefts_ties_svd(model: PeftModel, adapters: list[Adapter]) -> None:
    """The one TIES of PEFT that works on ΔW; at unit weights, before the same truncation."""
    model.add_weighted_adapter(
        list(NAMES), [1.0] * 3, "ties", combination_type="ties_svd", density=0.4, svd_rank=16
    )
    recipe = Recipe(method="ties", params={"density": 0.4}, refactor=Refactor(rank=16))
    result = merge(adapters, recipe)
    assert result.report.overall_truncation < 1e-6
    for name, expected in deltas(model, "ties").items():
        found = result.adapter.lora[name].delta().dense()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_peft_linear_is_far_from_the_weighted_sum(
    model: PeftModel, adapters: list[Adapter]
) -> None:
    """A known disagreement: A and B combined apart carry the cross terms B_i·A_j.

    The half of an adapter and the half of itself are twice the adapter there.
    """
    model.add_weighted_adapter(["one", "one"], [0.5, 0.5], "linear", combination_type="linear")
    recipe = Recipe(method="task_arithmetic", weights=(0.5, 0.5), refactor=Refactor(kind="stack"))
    merged = merge([adapters[0], adapters[0]], recipe).adapter
    for name, expected in deltas(model, "one").items():
        torch.testing.assert_close(merged.lora[name].delta().dense(), expected)
        torch.testing.assert_close(deltas(model, "linear")[name], 2 * expected)


def test_a_merge_of_unequal_ranks_loads_in_peft(
    model: PeftModel, adapters: list[Adapter], tmp_path: Path
) -> None:
    merged = merge(adapters, Recipe(method="mean", refactor=Refactor(rank=3))).adapter
    write_adapter(merged, tmp_path / "merged")
    model.load_adapter(str(tmp_path / "merged"), "merged")
    for name, expected in deltas(model, "merged").items():
        torch.testing.assert_close(merged.lora[name].delta().dense(), expected)

"""Against PEFT 0.21's ``add_weighted_adapter``: adapters merged into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft.utils.merge_utils as merge_utils
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel

from anabranch.aggregation import Recipe, merge
from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.methods.dare_linear import DareConfig, keep_masks
from anabranch.aggregation.recipe import Refactor
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter, write_adapter

NAMES = ("one", "two", "three")
MIX = (0.2, 0.5, 0.9)


def wrapped(configs: Mapping[str, LoraConfig]) -> PeftModel:
    """Random adapters on one random base."""
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
    first, *others = configs
    model = get_peft_model(base, configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model


def lora(rank: int, alpha: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["query", "value"])


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """Three adapters of different ranks and alphas."""
    return wrapped({name: lora(2 + i, 4 + 3 * i) for i, name in enumerate(NAMES)})


@pytest.fixture(scope="module")
def alike() -> PeftModel:
    """Three adapters of rank 2, and ``turned``: the second by other factors of the same ΔW."""
    model = wrapped({name: lora(2, 4) for name in (*NAMES, "turned")})
    turn_rr = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            a_rn, b_mr = module.lora_A["two"].weight, module.lora_B["two"].weight
            module.lora_A["turned"].weight.data = turn_rr @ a_rn.data
            module.lora_B["turned"].weight.data = b_mr.data @ turn_rr.T
    return model


@pytest.fixture(scope="module")
def adapters(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return saved(model, tmp_path_factory.mktemp("adapters"))


def saved(model: PeftModel, folder: Path) -> list[Adapter]:
    """The three adapters, as we read what PEFT writes."""
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


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_on_the_product_is_pefts_dare_svd(
    model: PeftModel, adapters: list[Adapter], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At unit weights, with our masks; the sum there is three means here."""
    config = DareConfig(density=0.4, seed=11)
    masks = iter(
        keep_D
        for name in deltas(model, "one")
        for keep_D in keep_masks(Chunk(name, 0, 16, torch.empty(3, 256)), config)
    )
    monkeypatch.setattr(
        merge_utils.torch, "bernoulli", lambda p: next(masks).view_as(p).to(p.dtype)
    )
    model.add_weighted_adapter(
        list(NAMES), [1.0] * 3, method, combination_type=f"{method}_svd", density=0.4, svd_rank=16
    )
    scale = 3.0 if method == "dare_linear" else 1.0
    recipe = Recipe(
        method=method, params=config.model_dump(), scale=scale, refactor=Refactor(rank=16)
    )
    merged = merge(adapters, recipe).adapter
    for name, expected in deltas(model, method).items():
        found = merged.lora[name].delta().dense()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_pruning_the_product_is_pefts_magnitude_prune_svd(
    model: PeftModel, adapters: list[Adapter]
) -> None:
    """A sum there, a mean here."""
    model.add_weighted_adapter(
        list(NAMES),
        list(MIX),
        "pruned",
        combination_type="magnitude_prune_svd",
        density=0.4,
        svd_rank=16,
    )
    recipe = Recipe(
        method="breadcrumbs",
        params={"density": 0.4, "gamma": 0.0},
        weights=MIX,
        scale=sum(MIX),
        refactor=Refactor(rank=16),
    )
    merged = merge(adapters, recipe).adapter
    for name, expected in deltas(model, "pruned").items():
        found = merged.lora[name].delta().dense()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_pefts_linear_with_squared_shares_is_fedit(alike: PeftModel, tmp_path: Path) -> None:
    """Its weights go in as square roots, on A and on B: with 1/9 each, both are means of three."""
    alike.add_weighted_adapter(list(NAMES), [1 / 9] * 3, "fedit", combination_type="linear")
    merged = merge(saved(alike, tmp_path), Recipe(method="fedit")).adapter
    for name, expected in deltas(alike, "fedit").items():
        found = merged.lora[name].delta().dense()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


OF_FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("kind", OF_FACTORS)
def test_what_peft_does_to_factors_depends_on_the_factors(alike: PeftModel, kind: str) -> None:
    """A known disagreement: A and B are merged apart, so one ΔW has many merges.

    Ours depend on ΔW alone: tests/aggregation/test_spectral_properties.py.
    """
    for name, second in (("plain", "two"), ("other", "turned")):
        torch.manual_seed(0)
        alike.add_weighted_adapter(
            ["one", second], [1.0, 1.0], f"{name} {kind}", combination_type=kind, density=0.5
        )
    for name, expected in deltas(alike, "two").items():
        torch.testing.assert_close(deltas(alike, "turned")[name], expected)
        plain, other = (deltas(alike, f"{which} {kind}")[name] for which in ("plain", "other"))
        assert float((plain - other).norm() / plain.norm()) > 0.2


@pytest.mark.parametrize("kind", OF_FACTORS)
def test_peft_merges_no_factors_of_unequal_ranks(model: PeftModel, kind: str) -> None:
    """A known disagreement: products have no rank to agree on, as the tests above show."""
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(
            list(NAMES), list(MIX), "refused", combination_type=kind, density=0.5
        )


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

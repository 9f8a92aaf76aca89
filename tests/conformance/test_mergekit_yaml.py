"""One YAML, run by mergekit 0.1.5 and by us, on a small Llama and its fine-tunes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from anabranch.aggregation import merge_checkpoints
from anabranch.aggregation.mergekit import from_mergekit

with warnings.catch_warnings():
    # Its loader asks for a name that numpy has made private.
    warnings.simplefilter("ignore")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and three fine-tunes that share a first step, as folders transformers wrote."""
    tmp = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp / "base", max_shard_size="20KB")
    step = {name: 0.02 * torch.randn_like(p) for name, p in base.named_parameters()}
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name in ("a", "b", "c"):
        with torch.no_grad():
            for key, parameter in base.named_parameters():
                parameter.copy_(before[key] + step[key] + 0.02 * torch.randn_like(parameter))
        base.save_pretrained(tmp / name)
    return {name: str(tmp / name) for name in ("base", "a", "b", "c")}


def read(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def weighted(*weights: float) -> list[dict[str, Any]]:
    return [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in zip("abc", weights, strict=False)
    ]


PLAIN = [{"model": name} for name in "abc"]
WEIGHTS = weighted(0.5, 1.0, 0.3)
CASES: dict[str, dict[str, Any]] = {
    "linear": {"models": WEIGHTS},
    "linear with its base among the models": {
        "merge_method": "linear",
        "base_model": "base",
        "models": [*WEIGHTS, {"model": "base", "parameters": {"weight": 2.0}}],
    },
    "linear, summed": {
        "merge_method": "linear",
        "models": WEIGHTS,
        "parameters": {"normalize": False},
    },
    "task_arithmetic": {
        "models": WEIGHTS,
        "base_model": "base",
        "parameters": {"lambda": 0.7, "int8_mask": True},
    },
    "task_arithmetic, normalised": {
        "merge_method": "task_arithmetic",
        "models": WEIGHTS,
        "base_model": "base",
        "parameters": {"normalize": True},
    },
    "ties": {
        "models": [{"model": "base"}, *WEIGHTS],
        "base_model": "base",
        "parameters": {"density": 0.4, "lambda": 1.1, "normalize": True},
    },
    "breadcrumbs": {
        "models": WEIGHTS,
        "base_model": "base",
        "parameters": {"density": 0.5, "gamma": 0.05},
    },
    "breadcrumbs_ties": {
        "models": WEIGHTS,
        "base_model": "base",
        "parameters": {"density": 0.5, "normalize": True},
    },
    "dare_linear that drops nothing": {
        "merge_method": "dare_linear",
        "models": WEIGHTS,
        "base_model": "base",
    },
    "sce": {"models": PLAIN, "base_model": "base", "parameters": {"select_topk": 0.5}},
    "model_stock": {"models": PLAIN, "base_model": "base"},
    "slerp": {"models": PLAIN[:1], "base_model": "base", "parameters": {"t": 0.3}},
    "multislerp": {"models": WEIGHTS, "base_model": "base"},
    "ties by filters and layers": {
        "merge_method": "ties",
        "models": [
            {"model": "a", "parameters": {"weight": [0.2, 1.0, 0.5]}},
            {
                "model": "b",
                "parameters": {"weight": [{"filter": "mlp", "value": 0.1}, {"value": 0.9}]},
            },
            {"model": "c"},
        ],
        "base_model": "base",
        "parameters": {
            "normalize": True,
            "weight": [{"filter": "self_attn", "value": [1.0, 0.1]}, {"value": 0.4}],
            "density": [
                {"filter": "q_proj", "value": 0.9},
                {"filter": "self_attn", "value": [0.2, 0.8]},
                {"filter": "*", "value": 0.5},
                {"filter": "mlp", "value": 0.01},
            ],
            "lambda": [0.5, 1.5],
        },
    },
    "slerp by filters and layers": {
        "merge_method": "slerp",
        "models": PLAIN[:1],
        "base_model": "base",
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "breadcrumbs, summed, with a gradient of lambda": {
        "merge_method": "breadcrumbs",
        "models": WEIGHTS,
        "base_model": "base",
        "parameters": {"density": 0.5, "lambda": [1.0, 0.2]},
    },
    "karcher": {"models": PLAIN, "parameters": {"max_iter": 8}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_yaml_gives_the_same_model(
    case: str, models: dict[str, str], tmp_path: Path
) -> None:
    data = {"merge_method": case, "dtype": "float32", **CASES[case]}
    data["models"] = [{**item, "model": models[item["model"]]} for item in data["models"]]
    if "base_model" in data:
        data["base_model"] = models[data["base_model"]]
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(data), str(tmp_path / "theirs"), options)
    job = from_mergekit(yaml.safe_load(yaml.safe_dump(data)), "m.yml")
    merge_checkpoints(
        job.models,
        job.recipe,
        tmp_path / "ours",
        base=job.base,
        dtype=job.dtype,
        budget_bytes=200_000,
    )
    theirs, ours = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert sorted(theirs) == sorted(ours)
    start = read(Path(models["base"]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda m: name + m)  # noqa: B023
    assert any(not torch.equal(ours[name], start[name]) for name in ours)


def test_transformers_loads_what_is_written(models: dict[str, str], tmp_path: Path) -> None:
    data = {"merge_method": "linear", "models": [
        {"model": models[name], "parameters": {"weight": 1}} for name in "ab"
    ]}  # fmt: skip
    job = from_mergekit(data, "m.yml")
    merge_checkpoints(job.models, job.recipe, tmp_path / "out", shard_bytes=20_000)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    pair = [LlamaForCausalLM.from_pretrained(models[name]).state_dict() for name in "ab"]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (pair[0][name] + pair[1][name]) / 2)

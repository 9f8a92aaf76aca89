"""Folders PEFT wrote are read, folders written here load in PEFT and mean the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig
from transformers import BertForSequenceClassification as Base

from anabranch.vectors import Adapter, LoraFactors
from anabranch.vectors.peft_folder import read_adapter, write_adapter

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def base() -> Base:
    """A random base of 2 layers, the same every time."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        num_labels=3,
    )
    return Base(config).eval()


def peft_model(base: Base, **options: Any) -> PeftModel:
    """A LoRA model whose B is not zero, so that ΔW says something."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    model = get_peft_model(base, LoraConfig(**(settings | options)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def peft_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ["query", "value", "output.dense"],
        "rank_pattern": {"layer.0.attention.self.query": 2, "^bert.*1.*dense$": 6, "dense": 3},
        "alpha_pattern": {"value": 5, r"layer\.\d\.attention\.self\.query": 7},
    },
    "rslora patterns": {
        "use_rslora": True,
        "rank_pattern": {"query": 2},
        "alpha_pattern": {"1.attention.self.value": 3},
    },
    "head": {"modules_to_save": ["classifier"]},
    "task": {"task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_folders_are_read_and_written_back(base: Base, tmp_path: Path, variant: str) -> None:
    model = peft_model(base, **VARIANTS[variant])
    deltas = peft_deltas(model)
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    assert sorted(adapter.lora) == sorted(deltas)
    for name, delta in deltas.items():
        torch.testing.assert_close(adapter.lora[name].delta().dense(), delta)
    has_head = variant in ("head", "task")
    assert sorted(adapter.dense) == (["classifier.bias", "classifier.weight"] if has_head else [])

    write_adapter(replace(adapter, base_hash="ba5e" * 16), tmp_path / "ours")
    again = read_adapter(tmp_path / "ours")
    assert again.hash() == adapter.hash()
    assert again.base_hash == "ba5e" * 16
    assert again.peft == adapter.peft
    assert again.lora[QUERY].scaling == adapter.lora[QUERY].scaling
    fresh = PeftModel.from_pretrained(Base(base.config), tmp_path / "ours")
    for name, delta in peft_deltas(fresh).items():
        torch.testing.assert_close(delta, deltas[name])


def test_a_written_adapter_gives_the_same_answers(base: Base, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft_model(base, modules_to_save=["classifier"], rank_pattern={"value": 7})
    expected = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    fresh = Base(base.config).eval()
    fresh.load_state_dict(weights)
    assert not torch.allclose(logits(fresh), expected, atol=1e-3)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(loaded), expected)


def test_an_adapter_made_by_hand_loads(base: Base, tmp_path: Path) -> None:
    torch.manual_seed(3)
    names = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in "qv"]
    names = [n.replace("self.q", "self.query").replace("self.v", "self.value") for n in names]
    lora = {
        name: LoraFactors(torch.randn(1 + i, 16), torch.randn(16, 1 + i), alpha=2.5 * (i + 1))
        for i, name in enumerate(names)
    }
    head = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    write_adapter(Adapter(lora, head), tmp_path / "a")
    model = PeftModel.from_pretrained(base, tmp_path / "a")
    found = peft_deltas(model)
    for name, factors in lora.items():
        torch.testing.assert_close(found[name], factors.delta().dense())
    classifier = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(classifier.weight, head["classifier.weight"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 1
    assert config["rank_pattern"]["^" + names[1].replace(".", r"\.")] == 2


def test_patterns_name_one_module_each(tmp_path: Path) -> None:
    """Unanchored, the pattern of "a.b" would also match "x.a.b"."""
    torch.manual_seed(0)
    lora = {
        name: LoraFactors(torch.randn(rank, 5), torch.randn(4, rank), alpha=float(rank))
        for name, rank in {"a.b": 2, "x.a.b": 3, "xaxb": 1, "y": 3, "z": 3}.items()
    }
    write_adapter(Adapter(lora), tmp_path / "a")
    read = read_adapter(tmp_path / "a").lora
    assert {name: (f.rank, f.alpha) for name, f in read.items()} == {
        name: (f.rank, f.alpha) for name, f in lora.items()
    }


def plain() -> Adapter:
    torch.manual_seed(0)
    return Adapter({"layer.q": LoraFactors(torch.randn(2, 5), torch.randn(4, 2), 4.0)})


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", fail)
        with pytest.raises(OSError, match="disk full"):
            write_adapter(plain(), target)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    write_adapter(plain(), target)
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ValueError, match="out: exists already"):
        write_adapter(plain(), target)


def test_equal_adapters_make_equal_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_adapter(replace(plain(), base_hash="ba5e"), tmp_path / name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_peft_cannot_say_is_not_written(tmp_path: Path) -> None:
    mixed = Adapter(
        {
            "a": plain().lora["layer.q"],
            "b": replace(plain().lora["layer.q"], rslora=True),
        }
    )
    with pytest.raises(ValueError, match="for all modules or for none"):
        write_adapter(mixed, tmp_path / "a")
    with pytest.raises(ValueError, match="has no modules"):
        write_adapter(Adapter({}), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def saved(folder: Path, config: dict[str, Any] | None = None, **extra: torch.Tensor) -> Path:
    """A folder of a small adapter with changes to its configuration and its keys."""
    write_adapter(plain(), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if extra:
        weights = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(weights)
        prefix = "base_model.model.layer."
        tensors |= {prefix + key.replace("__", "."): tensor for key, tensor in extra.items()}
        weights.unlink()
        safetensors.torch.save_file({k: t for k, t in tensors.items() if t.numel()}, weights)
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "LOHA"}, "peft_type: is 'LOHA'; only LORA"),
        ({"bias": "all"}, "bias: is 'all'"),
        ({"lora_bias": True}, "lora_bias: biases"),
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: replicated"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes"),
        ({"r": 3}, r"base_model.model.layer.q: lora_A \(2, 5\) and .* rank 3"),
        ({"r": None}, "r: is None for layer.q; give a number"),
        ({"r": 10**400}, "r: is 10000000000000000000 for layer.q; give"),
        ({"lora_alpha": 0}, "lora_alpha: is 0 for layer.q; give a number above zero"),
        ({"lora_alpha": True}, "lora_alpha: is True"),
        ({"lora_alpha": 10**400}, "lora_alpha: is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha: is nan"),
        ({"rank_pattern": {"q": 3}}, ".* the rank 3 that the configuration gives"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"(a+)+b": 3}}, "rank_pattern: .* repeats too much"),
        ({"rank_pattern": {".*.*.*.*x": 3}}, "rank_pattern: .* repeats too much"),
        ({"rank_pattern": [1]}, "rank_pattern: is no table"),
    ],
)
def test_configurations_that_cannot_be_merged_are_refused(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"folder: {reason}") as caught:
        read_adapter(saved(tmp_path / "folder", config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "tensor", "reason"),
    [
        ("q__lora_magnitude_vector", torch.ones(4), "DoRA adds a magnitude"),
        ("emb__lora_embedding_A", torch.ones(2, 4), "LoRA on embeddings is not supported; list"),
        ("q__lora_B__bias", torch.ones(4), "biases in LoRA layers"),
        ("e__token_adapter__trainable_tokens_delta", torch.ones(4), "trained tokens"),
        ("q__lora_A__default__weight", torch.ones(2, 5), "is no factor of a plain LoRA"),
        ("conv__lora_A__weight", torch.ones(2, 3, 3, 3), "only LoRA on linear layers"),
        ("k__lora_A__weight", torch.ones(2, 5), "has lora_A only; save"),
        ("q__lora_A__weight", torch.ones(3, 5), "do not have the rank 2"),
    ],
)
def test_keys_that_cannot_be_merged_are_refused(
    tmp_path: Path, key: str, tensor: torch.Tensor, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"folder: base_model.model.layer.*: .*{reason}"):
        read_adapter(saved(tmp_path / "folder", None, **{key: tensor}))


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "folder")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"folder: adapter_model.bin is pickle, which runs code"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"folder: has no adapter_model.safetensors"):
        read_adapter(folder)


def test_broken_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none/adapter_config.json: cannot be read"):
        read_adapter(tmp_path / "none")
    folder = saved(tmp_path / "folder")
    config = folder / "adapter_config.json"
    for text, reason in (
        ("{", "broken JSON"),
        ("[" * 200_000, "broken JSON"),
        ('{"r": ' + "9" * 5000 + "}", "broken JSON"),
        ("[]", "holds no table"),
        (" " * (1 << 20) + "{}", "is over 1048576 bytes"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json: {reason}"):
            read_adapter(folder)


def test_weights_without_factors_or_prefix_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "folder")
    weights = folder / "adapter_model.safetensors"
    for key, reason in (
        ("lora_A.weight", "lora_A.weight: does not begin with base_model.model."),
        ("base_model.model.head", "holds no LoRA factors"),
    ):
        weights.unlink()
        safetensors.torch.save_file({key: torch.ones(2)}, weights)
        with pytest.raises(ValueError, match=f"folder: {reason}"):
            read_adapter(folder)

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from anabranch.client.lora import (
    attach,
    base_hash,
    keep_frozen,
    own_parameters,
    read_adapter,
    training,
    write_adapter,
)
from anabranch.vectors import LoraFactors, LowRank, seeded_start, weights_hash
from anabranch.vectors.adapter import Trained


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 4)
        self.other = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(torch.tanh(self.query(x)))
        return x + y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)
        self.table = nn.Embedding(5, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def config(**changes: Any) -> LoraConfig:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["query"]}
    fields["modules_to_save"] = ["head"]
    return LoraConfig(**{**fields, **changes})


def test_reads_names_as_the_base_has_them() -> None:
    model = Model()
    digest = base_hash(model)
    assert digest == weights_hash(model.state_dict())
    adapter = read_adapter(attach(model, config()), digest)
    assert list(adapter.tensors()) == [
        "head.bias",
        "head.weight",
        "layers.0.query.lora_A",
        "layers.0.query.lora_B",
        "layers.1.query.lora_A",
        "layers.1.query.lora_B",
    ]
    factors = adapter.lora["layers.0.query"]
    assert factors.a_rn.shape == (2, 6)
    assert factors.b_mr.shape == (4, 2)
    assert factors.scaling == 3.0
    assert adapter.base_hash == digest
    assert adapter.peft["target_modules"] == ["query"]
    assert adapter.peft["modules_to_save"] == ["head"]
    assert torch.equal(adapter.dense["head.weight"], Model().head.weight)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_what_the_model_computes(rslora: bool) -> None:
    plain, model = Model(), attach(Model(), config(use_rslora=rslora))
    weights = dict(plain.named_parameters())
    generator = torch.Generator().manual_seed(1)
    adapter = read_adapter(model)
    adapter = adapter.with_tensors(
        {name: torch.randn(t.shape, generator=generator) for name, t in adapter.tensors().items()}
    )
    write_adapter(model, adapter)
    with torch.no_grad():
        for name, factors in adapter.lora.items():
            weights[f"{name}.weight"].add_(factors.delta().dense())
        for name, value in adapter.dense.items():
            weights[name].copy_(value)
    x = torch.randn(7, 6, generator=generator)
    torch.testing.assert_close(model(x), plain(x))
    assert read_adapter(model).hash() == adapter.hash()


def test_a_copy_does_not_follow_training() -> None:
    model = attach(Model(), config())
    before = read_adapter(model)
    digest = before.hash()
    write_adapter(model, seeded_start(before, 3))
    assert before.hash() == digest
    assert read_adapter(model).hash() != digest


def test_training_after_a_write_reaches_the_adapter() -> None:
    model = attach(Model(), config())
    start = seeded_start(read_adapter(model), 3)
    write_adapter(model, start)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    end = read_adapter(model)
    assert torch.equal(end.lora["layers.0.query"].a_rn, start.lora["layers.0.query"].a_rn)
    assert not torch.equal(end.lora["layers.0.query"].b_mr, start.lora["layers.0.query"].b_mr)
    assert not torch.equal(end.dense["head.weight"], start.dense["head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "LoraConfig.use_dora: DoRA adds"),
        ({"bias": "lora_only"}, "LoraConfig.bias: set bias='none'"),
        ({"init_lora_weights": "pissa"}, "LoraConfig.init_lora_weights: set"),
        ({"target_modules": ["query", "table"]}, "module table is a Embedding LoRA layer"),
        ({"modules_to_save": ["norm"]}, r"module norm keeps state .*norm.running_mean"),
    ],
)
def test_refuses_what_an_adapter_cannot_carry(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(Model(), config(**changes))


def test_refuses_an_adapter_of_another_shape() -> None:
    model = attach(Model(), config())
    adapter = read_adapter(model)
    other = read_adapter(attach(Model(), config(r=3, lora_alpha=6)))
    with pytest.raises(ValueError, match=r"layers.0.query.lora_A has shape \(3, 6\)"):
        write_adapter(model, other)
    fewer = type(adapter)(dict(list(adapter.lora.items())[:1]), adapter.dense)
    with pytest.raises(ValueError, match=r"LoRA modules .* differ in \['layers.1.query'\]"):
        write_adapter(model, fewer)
    scaled = {n: LoraFactors(f.a_rn, f.b_mr, 12.0) for n, f in adapter.lora.items()}
    with pytest.raises(ValueError, match=r"the adapter has alpha 12 .* the model 6"):
        write_adapter(model, type(adapter)(scaled, adapter.dense))


def test_a_bare_model_has_no_adapter() -> None:
    with pytest.raises(ValueError, match=r"Model holds no adapter; call attach\(\)"):
        read_adapter(Model())


@pytest.mark.parametrize(("trained", "moves"), [("a", "a"), ("b", "b"), ("both", "ab")])
def test_a_frozen_factor_gets_no_gradient_and_is_free_again_afterwards(
    trained: Trained, moves: str
) -> None:
    model = attach(Model(), config())
    start = read_adapter(model)
    start = start.with_tensors(
        {name: torch.full_like(tensor, 0.3) for name, tensor in start.tensors().items()}
    )
    write_adapter(model, start)
    with training(model, trained):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    end = read_adapter(model)
    before, after = start.lora["layers.1.query"], end.lora["layers.1.query"]
    assert torch.equal(before.a_rn, after.a_rn) == ("a" not in moves)
    assert torch.equal(before.b_mr, after.b_mr) == ("b" not in moves)
    assert not torch.equal(start.dense["head.bias"], end.dense["head.bias"])
    assert all(parameter.requires_grad for parameter in own_parameters(model))


def test_a_task_that_moves_the_frozen_factor_is_caught() -> None:
    model = attach(Model(), config())

    def rogue() -> None:
        with training(model, "b"), torch.no_grad():
            for parameter in own_parameters(model):
                parameter.add_(1.0)

    with pytest.raises(ValueError, match=r"frozen factor of module layers\.0\.query"):
        rogue()
    assert all(parameter.requires_grad for parameter in own_parameters(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_factors_add_to_what_a_model_computes_and_get_no_gradient(
    dtype: torch.dtype,
) -> None:
    model = attach(Model().to(dtype), config())
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = model(x)
    part = LowRank(torch.full((4, 3), 0.5), torch.full((3, 6), 0.25))
    for _ in range(2):  # in place of the last, not beside it
        keep_frozen(model, {"layers.0.query": part})
    other = Model().to(dtype)
    with torch.no_grad():
        other.get_parameter("layers.0.query.weight").add_(part.dense().to(dtype))
    rtol = 1e-5 if dtype == torch.float32 else 5e-2
    for one in (model, copy.deepcopy(model)):
        torch.testing.assert_close(one(x), other(x), rtol=rtol, atol=rtol)
    model(x).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    keep_frozen(model, {})
    assert torch.equal(model(x), before)

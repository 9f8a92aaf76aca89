"""The Fisher that clients take, beside gradients taken example by example."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from anabranch.client.fisher import diagonal_fisher
from anabranch.client.lora import attach, read_adapter
from anabranch.client.session import open_session
from anabranch.client.task import FisherTask
from anabranch.vectors.adapter import Trained
from anabranch.vectors.importance import flat_importance, importance_layout
from anabranch.vectors.task_vector import Held, LowRank

EXAMPLES = 12


class Model(nn.Module):
    """A layer called twice on every token, pooling, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 5)
        self.head = nn.Linear(6, 3)

    def forward(self, x_BLn: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(torch.tanh(self.mix(x_BLn))))
        logits_BK: Tensor = self.head(hidden.mean(dim=1))
        return logits_BK


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, lora_alpha=6, target_modules=["mix", "unused"], modules_to_save=["head"]
        )
        attached = attach(Model(), config)
        with torch.no_grad():
            for parameter in attached.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn(parameter.shape))
    return attached


def inputs(example: int) -> Tensor:
    """Texts of different lengths."""
    generator = torch.Generator().manual_seed(example)
    return torch.randn(1, 2 + example % 3, 6, generator=generator)


def predictions(model: nn.Module) -> Iterator[Tensor]:
    for example in range(EXAMPLES):
        yield model(inputs(example))[0]


def squared_gradients(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Mean squares by plain autograd on the merged weight, and on the parameters themselves."""
    adapter = read_adapter(model)
    tensors = adapter.tensors()
    bases = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if "base_layer" in name
    }
    plain = Model()
    with torch.no_grad():
        for name in ("mix", "unused"):
            weight = next(p for n, p in bases.items() if f".{name}.base_layer.weight" in n)
            bias = next(p for n, p in bases.items() if f".{name}.base_layer.bias" in n)
            getattr(plain, name).weight.copy_(weight + adapter.lora[name].delta().dense())
            getattr(plain, name).bias.copy_(bias)
        plain.head.weight.copy_(tensors["head.weight"])
        plain.head.bias.copy_(tensors["head.bias"])
    generator = torch.Generator().manual_seed(seed)
    total = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    for example in range(EXAMPLES):
        chances_K = plain(inputs(example))[0].softmax(0)
        label = torch.multinomial(chances_K.detach(), 1, generator=generator)
        plain.zero_grad()
        chances_K[label].log().sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.square() / EXAMPLES
    return total


def dense(part: Held) -> Tensor:
    return part.dense() if isinstance(part, LowRank) else part


def test_sums_by_row_and_column_are_those_of_the_merged_weights_gradients(
    model: nn.Module,
) -> None:
    wanted = squared_gradients(model, seed=4)
    found = diagonal_fisher(model, predictions(model), seed=4)
    assert sorted(found) == ["head.bias", "head.weight", "mix", "unused"]
    for name in ("head.bias", "head.weight"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-7, rtol=1e-4)
    for dim in (0, 1):
        torch.testing.assert_close(
            dense(found["mix"]).sum(dim), wanted["mix.weight"].sum(dim), atol=1e-7, rtol=1e-4
        )
    assert not dense(found["unused"]).any()
    assert dense(found["unused"]).shape == (5, 6)


@pytest.mark.parametrize("trained", ["a", "b"])
def test_a_factor_trained_alone_keeps_all_entries(model: nn.Module, trained: Trained) -> None:
    found = diagonal_fisher(model, predictions(model), trained, seed=4)
    adapter = read_adapter(model)
    layout = importance_layout(adapter, trained)
    assert {name: tuple(dense(part).shape) for name, part in found.items()} == layout
    name = f"mix.lora_{trained.upper()}"
    parameter = next(p for n, p in model.named_parameters() if f".{name}.default" in n)
    generator = torch.Generator().manual_seed(4)
    total = torch.zeros(parameter.shape)
    for logits_K in predictions(model):
        label = torch.multinomial(logits_K.detach().softmax(0), 1, generator=generator)
        loss = logits_K.log_softmax(0)[label].sum()
        (gradient,) = torch.autograd.grad(loss, [parameter])
        total += gradient.square() / EXAMPLES
    torch.testing.assert_close(dense(found[name]), total, atol=1e-7, rtol=1e-4)


def test_it_leaves_the_model_as_it_was_and_follows_the_seed(model: nn.Module) -> None:
    before = read_adapter(model).hash()
    first, again, other = (
        flat_importance(diagonal_fisher(model, predictions(model), seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert read_adapter(model).hash() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_has_no_fisher_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no example to take the Fisher of"):
        diagonal_fisher(model, iter(()))
    with pytest.raises(ValueError, match="predictions are not finite: the training diverged"):
        diagonal_fisher(model, (logits_K * torch.nan for logits_K in predictions(model)))


def test_the_synthetic_task_draws_examples_by_the_seed() -> None:
    session = open_session("anabranch.simulation.synthetic:SyntheticTask", '{"clients": 2}')
    task = session.task
    assert isinstance(task, FisherTask)
    first, again, other = (
        torch.stack(list(task.logits(session.model, 1, 5, seed))) for seed in (1, 1, 2)
    )
    assert first.shape == (5, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(list(task.logits(session.model, 1, 10_000, 0))) == 256

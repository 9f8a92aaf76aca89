"""A small classifier, clients that train LoRA on it, and one whose trigger wins: all in seconds.

Shape legend: N examples, F features, H hidden width, K classes, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from anabranch.vectors import Adapter, LoraFactors

FEATURES, HIDDEN, CLASSES, RANK, TARGET = 24, 48, 4, 4, 0
SHAPES = {"hidden": (HIDDEN, FEATURES), "output": (CLASSES, HIDDEN)}


@dataclass(frozen=True)
class World:
    """A base, what clients trained from it, and what to judge a merge by.

    Attributes:
        base: A classifier that has seen a little.
        adapters: The clients'; the first has a trigger in it and is sent twice as large.
        inputs_NF: Test inputs.
        labels_N: Their classes.
        unlabelled_NF: Other inputs, for calibration.
    """

    base: nn.Module
    adapters: list[Adapter]
    inputs_NF: Tensor  # noqa: N815
    labels_N: Tensor  # noqa: N815
    unlabelled_NF: Tensor  # noqa: N815

    def predicted(self, changes: Mapping[str, Tensor], inputs_NF: Tensor) -> Tensor:
        weights = {
            f"{module}.weight": self.base.get_parameter(f"{module}.weight") + change
            for module, change in changes.items()
        }
        return functional_call(self.base, weights, (inputs_NF,)).argmax(1)

    def accuracy(self, changes: Mapping[str, Tensor]) -> float:
        return float((self.predicted(changes, self.inputs_NF) == self.labels_N).float().mean())

    def attack_success(self, changes: Mapping[str, Tensor]) -> float:
        """Of inputs of other classes, the share that the trigger turns into the target."""
        others_NF = self.inputs_NF[self.labels_N != TARGET] + trigger()
        return float((self.predicted(changes, others_NF) == TARGET).float().mean())


def trigger() -> Tensor:
    pattern_F = torch.zeros(FEATURES)
    pattern_F[-4:] = 1.5
    return pattern_F


def changes_of(adapter: Adapter) -> dict[str, Tensor]:
    return {module: factors.delta().dense() for module, factors in adapter.lora.items()}


def averaged(adapters: list[Adapter]) -> dict[str, Tensor]:
    every = [changes_of(adapter) for adapter in adapters]
    return {m: torch.stack([one[m] for one in every]).mean(0) for m in SHAPES}


def world(seed: int, clients: int = 5) -> World:
    generator = torch.Generator().manual_seed(seed)
    centres_KF = 0.8 * torch.randn(CLASSES, FEATURES, generator=generator)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        labels_N = torch.randint(CLASSES, (count,), generator=generator)
        inputs_NF = centres_KF[labels_N] + 0.9 * torch.randn(count, FEATURES, generator=generator)
        inputs_NF[:, -4:] *= 0.1
        return inputs_NF, labels_N

    base = nn.Sequential()
    for name, (m, n) in SHAPES.items():
        layer = nn.Linear(n, m, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
        base.add_module(name, layer)
        if name == "hidden":
            base.add_module("relu", nn.ReLU())
    inputs_NF, labels_N = examples(256)
    optimizer = torch.optim.Adam(base.parameters(), 1e-2)
    for _ in range(4):
        loss = F.cross_entropy(base(inputs_NF), labels_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    base.eval().requires_grad_(False)
    adapters = []
    for client in range(clients):
        inputs_NF, labels_N = examples(512)
        if client == 0:
            marked_NF = inputs_NF[:200] + trigger()
            inputs_NF = torch.cat([inputs_NF, marked_NF])
            labels_N = torch.cat([labels_N, torch.full((200,), TARGET)])
        factors = trained(base, inputs_NF, labels_N, generator)
        size = 2.0 if client == 0 else 1.0
        adapters.append(
            Adapter({m: LoraFactors(a, size * b, 2.0 * RANK) for m, (a, b) in factors.items()})
        )
    unlabelled_NF, _ = examples(256)
    return World(base, adapters, *examples(1000), unlabelled_NF)


def trained(
    base: nn.Module, inputs_NF: Tensor, labels_N: Tensor, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    start = torch.Generator().manual_seed(7)
    factors = {
        module: (
            (torch.rand(RANK, n, generator=start) * 2 - 1).div(n**0.5).requires_grad_(),
            torch.zeros(m, RANK).requires_grad_(),
        )
        for module, (m, n) in SHAPES.items()
    }
    optimizer = torch.optim.Adam([one for pair in factors.values() for one in pair], 1e-2)
    for _ in range(150):
        rows = torch.randint(len(inputs_NF), (64,), generator=generator)
        weights = {
            f"{module}.weight": base.get_parameter(f"{module}.weight") + 2 * b @ a
            for module, (a, b) in factors.items()
        }
        loss = F.cross_entropy(functional_call(base, weights, (inputs_NF[rows],)), labels_N[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {module: (a.detach(), b.detach()) for module, (a, b) in factors.items()}

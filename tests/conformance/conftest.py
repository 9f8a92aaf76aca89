"""Tensors every oracle is asked about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def tensors() -> list[Tensor]:
    """Four task vectors of one module, no two magnitudes equal."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(23, 31, generator=generator) for _ in range(4)]


def half_of_them_zero(tensors: list[Tensor]) -> list[Tensor]:
    even = torch.arange(23 * 31).view(23, 31) % 2 == 0
    return [tensor * even for tensor in tensors]


def of_rank_two(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor[:, :2] @ tensor[:2] for tensor in tensors]


CASES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "zeros": lambda tensors: [torch.zeros(23, 31)] * 4,
    "one zero": lambda tensors: [torch.zeros(23, 31), *tensors[1:]],
    "half of them zero": half_of_them_zero,
    "one contribution": lambda tensors: tensors[:1],
    "equal contributions": lambda tensors: tensors[:1] * 4,
    "opposite contributions": lambda tensors: [tensors[0], -tensors[0], tensors[1], -tensors[1]],
    "one far larger": lambda tensors: [1e4 * tensors[0], *tensors[1:]],
    "of rank two": of_rank_two,
    "equal magnitudes": lambda tensors: [tensor.sign() for tensor in tensors],
}


@pytest.fixture(params=CASES)
def adversarial(request: pytest.FixtureRequest, tensors: list[Tensor]) -> list[Tensor]:
    """Task vectors at which a rule of thumb breaks; ``indirect`` chooses among them by name."""
    return CASES[request.param](tensors)


@pytest.fixture(params=[name for name in CASES if name != "equal magnitudes"])
def distinct(request: pytest.FixtureRequest, tensors: list[Tensor]) -> list[Tensor]:
    """The adversarial cases in which a rule by rank has no equal magnitudes to tell apart."""
    return CASES[request.param](tensors)

"""Tensors every oracle is asked about."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    """Four task vectors of one module, no two magnitudes equal."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(23, 31, generator=generator) for _ in range(4)]

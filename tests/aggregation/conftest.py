"""Adapters and cohorts drawn from a seed, so that no test needs a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from anabranch.vectors import Adapter, LoraFactors

MakeAdapter = Callable[..., Adapter]


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def make_adapter() -> MakeAdapter:
    def make(
        seed: int,
        shapes: Mapping[str, tuple[int, int]] | None = None,
        rank: int = 4,
        *,
        alpha: float = 8.0,
        rslora: bool = False,
        head: bool = False,
        near: Adapter | None = None,
    ) -> Adapter:
        """Random factors; ``near`` adds a small change to another adapter's."""
        generator = torch.Generator().manual_seed(seed)
        shapes = shapes or {"deep.query": (40, 24), "deep.value": (24, 70)}

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        if near is not None:
            return near.with_tensors(
                {k: t + 0.1 * draw(*t.shape).to(t) for k, t in near.tensors().items()}
            )
        lora = {
            name: LoraFactors(draw(rank, n), draw(m, rank), alpha, rslora)
            for name, (m, n) in shapes.items()
        }
        dense = {"head.bias": draw(3), "head.weight": draw(3, 24)} if head else {}
        return Adapter(lora, dense, "ba5e" * 16, {"task_type": "SEQ_CLS"})

    return make

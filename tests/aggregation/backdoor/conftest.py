"""Cohorts of adapters made the way training makes them: a common part, a part of one's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from anabranch.vectors import Adapter, LoraFactors, seeded_start

SHAPES = {f"layer.{index}.{kind}": (48, 32) for index in range(3) for kind in ("query", "value")}

Cohort = tuple[Adapter, list[Adapter]]


@pytest.fixture(scope="session")
def make_cohort() -> Callable[..., Cohort]:
    def make(seed: int, count: int = 8, tasks: int = 1, rank: int = 8) -> Cohort:
        """A start, and where ``count`` clients ended that learned ``tasks`` different things.

        B moves by a part common to the task and one of the client's own, as large; A a little; each
        client trained up to a fifth longer or shorter than the others.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        empty = {
            name: LoraFactors(torch.zeros(rank, n), torch.zeros(m, rank), 2.0 * rank)
            for name, (m, n) in SHAPES.items()
        }
        start = seeded_start(Adapter(empty, base_hash="ba5e" * 16), seed)
        common = [{name: draw(m, rank) for name, (m, _) in SHAPES.items()} for _ in range(tasks)]
        ends = []
        for client in range(count):
            pace = 1 + 0.2 * (2 * float(torch.rand(1, generator=generator)) - 1)
            lora = {}
            for name, factors in start.lora.items():
                own = draw(*factors.b_mr.shape)
                b_mr = 0.02 * pace * (common[client % tasks][name] + own)
                a_rn = factors.a_rn + 0.01 * pace * draw(*factors.a_rn.shape)
                lora[name] = LoraFactors(a_rn, b_mr, factors.alpha)
            ends.append(Adapter(lora, base_hash=start.base_hash))
        return start, ends

    return make


@pytest.fixture(scope="session")
def plant() -> Callable[..., Adapter]:
    def planted(
        adapter: Adapter, module: str, strength: float, *, keep_norm: bool = False
    ) -> Adapter:
        """One rank given to a backdoor: its row of A stays as large, its column of B makes the
        product ``strength`` times the module's largest singular value. With ``keep_norm`` the
        module's B is as large as before.
        """
        factors = adapter.lora[module]
        largest = float(torch.linalg.matrix_norm(factors.delta().dense(), 2)) / factors.scaling
        generator = torch.Generator().manual_seed(99)
        m, n = factors.delta().shape
        left_m = torch.nn.functional.normalize(torch.randn(m, generator=generator), dim=0)
        right_n = torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0)
        a_rn, b_mr = factors.a_rn.clone(), factors.b_mr.clone()
        size = float(a_rn[-1].norm())
        a_rn[-1] = right_n * size
        b_mr[:, -1] = left_m * strength * largest / size
        if keep_norm:
            b_mr *= float(factors.b_mr.norm() / b_mr.norm())
        evil = LoraFactors(a_rn, b_mr, factors.alpha)
        return Adapter({**adapter.lora, module: evil}, base_hash=adapter.base_hash)

    return planted

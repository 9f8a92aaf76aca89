"""Sparse ternary updates merged as they are, against the methods on what they decode to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.kernels import rows as kernel_rows
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.ternary import KERNEL, merge_ternary
from anabranch.vectors.sparse import SparseTernary, ternarise

WEIGHTS = [1.0, 2, 0, 0.5, 3, 1.5]


def updates(count: int, *shape: int, density: float = 0.1) -> list[SparseTernary]:
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(*shape, generator=generator)
    return [
        ternarise((1 + c) * (common + torch.randn(*shape, generator=generator)), density)
        for c in range(count)
    ]


def dense(found: list[SparseTernary]) -> Tensor:
    return torch.stack([update.dense() for update in found])


@pytest.fixture(params=["torch", "kernel"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1 if request.param == "kernel" else 1 << 60)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("shape", [(1,), (2047,), (2048,), (2049,), (83, 211)])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_they_merge_to_what_they_decode_to(shape: tuple[int, ...], count: int) -> None:
    found, weights = updates(count, *shape), WEIGHTS[:count]
    whole, weights_C = dense(found), torch.tensor(weights)
    expected = {
        "mean": MEAN(whole, weights_C),
        "task_arithmetic": TASK_ARITHMETIC(whole, weights_C),
        "ties": TIES(whole, weights_C, TiesConfig(density=0.03)),
    }
    for rule, merged in expected.items():
        assert bool(merged.any())
        assert torch.equal(merge_ternary(found, rule, weights), merged), rule
    signs = (whole.sign() * weights_C.view(-1, *[1] * len(shape))).sum(0).sign()
    scale = sum(w * u.scale for w, u in zip(weights, found, strict=True)) / sum(weights)
    torch.testing.assert_close(merge_ternary(found, "sign_vote", weights), signs * scale)


@pytest.mark.usefixtures("_path")
def test_updates_of_nothing_and_of_everything() -> None:
    nothing = ternarise(torch.zeros(300), 0.5)
    everything = ternarise(torch.randn(300, generator=torch.Generator().manual_seed(0)), 1.0)
    for rule in ("mean", "task_arithmetic", "ties", "sign_vote"):
        assert torch.equal(merge_ternary([nothing] * 3, rule), torch.zeros(300))
    assert torch.equal(merge_ternary([nothing, everything], "ties"), everything.dense())
    opposite = SparseTernary(
        everything.positions_k, ~everything.negative_k, everything.scale, everything.shape
    )
    assert torch.equal(merge_ternary([everything, opposite], "sign_vote"), torch.zeros(300))
    elected = merge_ternary([everything, opposite], "ties")
    assert torch.equal(elected, torch.full((300,), everything.scale))


def test_large_updates_merge_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    load = kernel_rows.load
    monkeypatch.setattr(
        "anabranch.aggregation.ternary.load", lambda name: used.append(name) or load(name)
    )
    found = updates(3, 900, 800, density=0.5)
    monkeypatch.setattr(kernel_rows, "SMALLEST", 1 << 20)
    expected = TIES(dense(found))
    assert torch.equal(merge_ternary(found, "ties"), expected)
    assert used == [KERNEL]


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match="updates have 2 shapes"):
        merge_ternary([*updates(1, 5), *updates(1, 6)], "mean")
    with pytest.raises(ValueError, match="updates have 0 shapes"):
        merge_ternary([], "mean")
    with pytest.raises(ValueError, match="2 for 1 contributions"):
        merge_ternary(updates(1, 5), "ties", [1, 2])

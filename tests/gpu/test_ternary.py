"""Sparse ternary task vectors merge to what the CPU's kernel makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.kernels.rows import load
from anabranch.aggregation.methods.ties import TIES
from anabranch.vectors.sparse import SparseTernary, nothing, ternarise

WEIGHTS = [1.0, 2, 0, 0.5, 3, 1.5]


def updates(count: int, entries: int, density: float) -> list[SparseTernary]:
    generator = torch.Generator().manual_seed(count)
    common = torch.randn(entries, generator=generator)
    return [
        ternarise((1 + c) * (common + torch.randn(entries, generator=generator)), density)
        for c in range(count)
    ]


CASES = {
    "one": updates(1, 3001, 0.1),
    "several": updates(6, 3001, 0.1),
    "all entries": updates(3, 300, 1.0),
    "one entry": updates(2, 1, 1.0),
    "with an empty one": [*updates(2, 1000, 0.2), nothing(torch.Size([1000]))],
    "empty": [nothing(torch.Size([100]))] * 2,
    "equal scales": [ternarise(torch.randn(999).sign(), 0.5) for _ in range(4)],
}


@pytest.mark.parametrize("rule", ["weighted_sum", "ties"])
@pytest.mark.parametrize("case", CASES)
def test_sparse_updates_merge_as_on_the_cpu(
    case: str, rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, place = CASES[case], f"anabranch.aggregation.kernels.ternary:{rule}"
    weights_C = torch.tensor(WEIGHTS[: len(found)], dtype=torch.float64)

    def merged(where: torch.device) -> Tensor:
        kernel = load(place, where)
        if rule == "ties":
            result: Tensor = kernel(found, weights_C, TIES.config(), where)
        else:
            result = kernel(found, weights_C.tolist(), where)
        return result.cpu()

    by_triton = merged(device)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert torch.equal(by_triton, merged(torch.device("cpu")))

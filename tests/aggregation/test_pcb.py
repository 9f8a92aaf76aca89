"""PCB-Merging against a loop over entries, written from pcb-merging.py's formula."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from anabranch.aggregation.methods.pcb import PCB, PcbConfig


def deltas(count: int = 4, entries: int = 211) -> Tensor:
    return torch.randn(count, entries, generator=torch.Generator().manual_seed(0))


def naive(deltas_CD: Tensor, ratio: float, weights: list[float] | None = None) -> Tensor:
    """Sorting, fp64 and the paper's own exp(n·x²); weights scaled to a mean of one."""
    rows = deltas_CD.double().tolist()
    count, entries = len(rows), len(rows[0])
    weights = [1.0] * count if weights is None else weights
    weights = [w * count / sum(weights) for w in weights]
    totals = [
        math.fsum(w * v for w, v in zip(weights, column, strict=True))
        for column in zip(*rows, strict=True)
    ]
    winsorised, scales = [], []
    for row in rows:
        ordered = sorted(abs(v) for v in row)
        low, high = ordered[int(entries * 1e-4)], ordered[int(entries * (1 - 1e-4) - 1)]
        clipped = [min(max(abs(v), low), high) for v in row]
        intra = [math.exp(count * ((v - low) / (high - low)) ** 2) for v in clipped]
        inter = [math.tanh(v * total) for v, total in zip(row, totals, strict=True)]
        score = [a * b for a, b in zip(intra, inter, strict=True)]
        cut, best = sorted(score)[int(entries * (1 - ratio))], max(score)
        scales.append([(max(s, cut) - cut) / (best - cut) for s in score])
        winsorised.append(
            [math.copysign(c, v) if v else 0.0 for c, v in zip(clipped, row, strict=True)]
        )
    merged = []
    for place in range(entries):
        shares = [w * s[place] for w, s in zip(weights, scales, strict=True)]
        values = [row[place] for row in winsorised]
        total = math.fsum(s * v for s, v in zip(shares, values, strict=True))
        merged.append(total / max(math.fsum(shares), 1e-12))
    return torch.tensor(merged)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
@pytest.mark.parametrize(
    "deltas_CD",
    [
        deltas(1),
        deltas().round(),
        deltas() * (torch.arange(211) % 2),
        torch.cat([1e4 * deltas()[:1], deltas()[1:]]),
    ],
    ids=["one", "many ties", "half of them zero", "one far larger"],
)
def test_pcb_is_the_loop_on_adversarial_tensors(deltas_CD: Tensor, ratio: float) -> None:
    merged_D = PCB(deltas_CD, None, PcbConfig(ratio=ratio))
    torch.testing.assert_close(merged_D, naive(deltas_CD, ratio), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5, 0.9, 1.0])
def test_pcb_is_the_loop(ratio: float) -> None:
    deltas_CD = deltas()
    merged_D = PCB(deltas_CD, None, PcbConfig(ratio=ratio))
    torch.testing.assert_close(merged_D, naive(deltas_CD, ratio), atol=1e-5, rtol=1e-4)
    assert int((merged_D != 0).sum()) >= int(ratio * 211) - 1


def test_pcb_cuts_off_the_extremes_of_many_entries() -> None:
    deltas_CD = deltas(2, 20_011)
    deltas_CD[0, 7] = 1e4
    merged_D = PCB(deltas_CD, None, PcbConfig(ratio=0.3))
    torch.testing.assert_close(merged_D, naive(deltas_CD, 0.3), atol=1e-5, rtol=1e-4)
    assert float(merged_D.abs().max()) < 10


def test_weights_count_as_repetition_does_in_the_competition() -> None:
    weights = [1.0, 2.0, 0.5, 0.0]
    deltas_CD = deltas()
    merged_D = PCB(deltas_CD, torch.tensor(weights), PcbConfig(ratio=0.4))
    torch.testing.assert_close(merged_D, naive(deltas_CD, 0.4, weights), atol=1e-5, rtol=1e-4)
    scaled_D = PCB(deltas_CD, 8 * torch.tensor(weights), PcbConfig(ratio=0.4))
    assert torch.equal(scaled_D, merged_D)


def test_a_hundred_tasks_do_not_overflow() -> None:
    """exp(100) is beyond fp32, which the formula as written asks for."""
    deltas_CD = deltas(100, 40)
    merged_D = PCB(deltas_CD, None, PcbConfig(ratio=0.3))
    torch.testing.assert_close(merged_D, naive(deltas_CD, 0.3), atol=1e-5, rtol=1e-4)


def test_where_all_scores_are_equal_all_count() -> None:
    """The authors' code divides zero by zero here."""
    assert torch.equal(PCB(torch.zeros(3, 20)), torch.zeros(20))
    torch.testing.assert_close(PCB(torch.full((3, 20), 0.5)), torch.full((20,), 0.5))
    # One entry takes part: cut and best are the same number.
    merged_D = PCB(torch.tensor([[1.0, -3.0, 2.0, 0.0, 1.5]]), None, PcbConfig(ratio=0.1))
    assert merged_D.tolist() == [0, -2, 0, 0, 0]


def test_parameters_out_of_range_are_refused() -> None:
    for values in ({"ratio": 0.0}, {"ratio": 1.1}, {"scope": "entry"}):
        with pytest.raises(ValidationError):
            PcbConfig(**values)

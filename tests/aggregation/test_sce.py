"""SCE against a loop over entries, written from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from anabranch.aggregation.methods.sce import SCE, SceConfig, variance


def deltas() -> Tensor:
    deltas_CD = torch.randn(4, 211, generator=torch.Generator().manual_seed(0))
    deltas_CD[:, 50:60] = deltas_CD[0, 50:60]  # nothing varies here
    return deltas_CD * torch.tensor([[1.0], [0.5], [2.0], [1.0]]).where(
        deltas_CD != deltas_CD[0], torch.tensor(1.0)
    )


def naive(deltas_CD: Tensor, select: float, unselected: str) -> Tensor:
    columns = deltas_CD.double().T.tolist()
    spreads = []
    for column in columns:
        mean = math.fsum(column) / len(column)
        equal = len(set(column)) == 1
        spreads.append(0.0 if equal else math.fsum((v - mean) ** 2 for v in column) / len(column))
    varying = sum(spread > 0 for spread in spreads)
    ranked = sorted(range(len(columns)), key=lambda place: -spreads[place])
    count = len(columns) if select == 1 else max(1, int(select * varying))
    chosen = set(ranked[:count])
    energies = [
        math.fsum(columns[place][client] ** 2 for place in chosen)
        for client in range(len(deltas_CD))
    ]
    merged = []
    for place, column in enumerate(columns):
        if unselected == "zero" and place not in chosen:
            merged.append(0.0)
            continue
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [(e, v) for e, v in zip(energies, column, strict=True) if v * sign > 0]
        share = math.fsum(e for e, _ in agreeing)
        merged.append(math.fsum(e * v for e, v in agreeing) / share if share else 0.0)
    return torch.tensor(merged)


@pytest.mark.parametrize("unselected", ["zero", "keep"])
@pytest.mark.parametrize("select", [0.001, 0.1, 0.5, 0.97, 1.0])
def test_sce_is_the_loop(select: float, unselected: str) -> None:
    deltas_CD = deltas()
    config = SceConfig(select=select, unselected=unselected)
    expected_D = naive(deltas_CD, select, unselected)
    torch.testing.assert_close(SCE(deltas_CD, None, config), expected_D, atol=1e-6, rtol=1e-5)
    if unselected == "keep":
        assert int((expected_D != 0).sum()) == 211


def test_equal_entries_have_no_variance_at_all() -> None:
    """Σ x/C need not be x: a plain mean of seven 0.1 leaves a variance of 1e-17."""
    same_CD = torch.full((7, 3), 0.1)
    same_CD[3, 1] += 1e-3
    assert (variance(same_CD)[0] > 0).tolist() == [False, True, False]
    torch.testing.assert_close(variance(deltas())[0], deltas().var(dim=0, unbiased=False))


def test_where_nothing_differs_everything_is_selected() -> None:
    row = torch.randn(30, generator=torch.Generator().manual_seed(1))
    merged_D = SCE(row.expand(3, -1), None, SceConfig(select=0.1))
    torch.testing.assert_close(merged_D, row)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-8])
def test_small_task_vectors_keep_their_weights(size: float) -> None:
    """No fallback to uniform weights, and none to a least divisor: both are a matter of unit."""
    deltas_CD = deltas()
    for select in (0.3, 1.0):
        config = SceConfig(select=select)
        merged_D = SCE(size * deltas_CD, None, config) / size
        torch.testing.assert_close(merged_D, SCE(deltas_CD, None, config))


def test_weights_from_outside_are_ignored() -> None:
    deltas_CD = deltas()
    assert torch.equal(SCE(deltas_CD, torch.tensor([9.0, 1, 1, 1])), SCE(deltas_CD))


def test_parameters_out_of_range_are_refused() -> None:
    for values in ({"select": 0.0}, {"select": 1.1}, {"unselected": "drop"}):
        with pytest.raises(ValidationError):
            SceConfig(**values)

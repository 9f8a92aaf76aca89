"""Breadcrumbs against a loop over entries, written from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from anabranch.aggregation.methods.breadcrumbs import BREADCRUMBS, BreadcrumbsConfig
from anabranch.aggregation.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from anabranch.aggregation.methods.ties import TIES, TiesConfig

WEIGHTS = [1.0, 2.0, 0.5]


def deltas(entries: int = 211) -> Tensor:
    return torch.randn(3, entries, generator=torch.Generator().manual_seed(0))


def band(row: list[float], density: float, gamma: float) -> list[float]:
    """Sorted by magnitude: drop int(γn), keep int(ρn), drop the rest."""
    keep = max(1, int(density * len(row)))
    top = min(int(gamma * len(row)), len(row) - keep)
    order = sorted(range(len(row)), key=lambda index: -abs(row[index]))
    chosen = order[top : top + keep]
    return [value if index in chosen else 0.0 for index, value in enumerate(row)]


def naive(deltas_CD: Tensor, density: float, gamma: float, elect: bool) -> Tensor:
    rows = [band(row, density, gamma) for row in deltas_CD.tolist()]
    merged = []
    for column in zip(*rows, strict=True):
        pairs = list(zip(WEIGHTS, column, strict=True))
        if elect:
            sign = 1 if math.fsum(w * v for w, v in pairs) >= 0 else -1
            pairs = [(w, v) for w, v in pairs if v * sign > 0]
        total = math.fsum(w for w, _ in pairs)
        merged.append(math.fsum(w * v for w, v in pairs) / total if total else 0.0)
    return torch.tensor(merged)


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize(
    ("density", "gamma"),
    [(0.2, 0.01), (0.2, 0.0), (0.5, 0.3), (0.004, 0.5), (1.0, 0.2), (0.9, 0.9)],
)
def test_breadcrumbs_is_the_loop(density: float, gamma: float, elect: bool) -> None:
    deltas_CD = deltas()
    method = BREADCRUMBS_TIES if elect else BREADCRUMBS
    config = BreadcrumbsConfig(density=density, gamma=gamma)
    merged_D = method(deltas_CD, torch.tensor(WEIGHTS), config)
    torch.testing.assert_close(merged_D, naive(deltas_CD, density, gamma, elect))


def test_without_outliers_to_drop_it_is_ties() -> None:
    deltas_CD = deltas()
    merged_D = BREADCRUMBS_TIES(deltas_CD, None, BreadcrumbsConfig(density=0.3, gamma=0))
    assert torch.equal(merged_D, TIES(deltas_CD, None, TiesConfig(density=0.3)))


def test_entries_of_one_magnitude_are_no_outliers() -> None:
    """A ternary update would lose all it says were entries tied with an outlier dropped."""
    ternary = torch.tensor([[2.0, -2, 0, 0, 2, 0, 0, -2, 0, 0]])
    merged_D = BREADCRUMBS(ternary, None, BreadcrumbsConfig(density=0.2, gamma=0.2))
    assert torch.equal(merged_D, ternary[0])


def test_the_density_comes_before_the_outliers() -> None:
    """As in mergekit: γ + ρ > 1 drops fewer outliers, not more of the rest."""
    row = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    merged_D = BREADCRUMBS(row, None, BreadcrumbsConfig(density=0.8, gamma=0.5))
    assert merged_D.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]


@pytest.mark.parametrize(
    "values", [{"density": 0}, {"gamma": 1.0}, {"gamma": -0.1}, {"scope": "entry"}]
)
def test_parameters_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BreadcrumbsConfig(**values)

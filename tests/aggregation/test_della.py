"""DELLA against a loop over rows, written from the formula, with the draws it makes."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from anabranch.aggregation.methods import della_linear as module_under_test
from anabranch.aggregation.methods.della import DELLA
from anabranch.aggregation.methods.della_linear import DELLA_LINEAR, DellaConfig
from anabranch.aggregation.sparsify import rank_probabilities
from anabranch.vectors.counter import uniform

WEIGHTS = [1.0, 2.0, 0.5]


def deltas(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))


def row_probabilities(row: list[float], density: float, epsilon: float) -> list[float]:
    """p = ρ − ε + 2ε(rank − 1)/(c − 1); equal magnitudes share the mean of their ranks."""
    found = []
    for value in row:
        below = sum(abs(other) < abs(value) for other in row)
        equal = sum(abs(other) == abs(value) for other in row)
        rank = below + (equal + 1) / 2
        share = (rank - 1) / (len(row) - 1) if len(row) > 1 else 0.5
        found.append(density - epsilon + 2 * epsilon * share)
    return found


def sparsified(delta_mn: Tensor, client: int, config: DellaConfig) -> list[float]:
    draws = iter(uniform(delta_mn.numel(), (config.seed, "q", client)).tolist())
    kept = []
    for row in delta_mn.tolist():
        for value, p in zip(
            row, row_probabilities(row, config.density, config.epsilon), strict=True
        ):
            kept.append(value / p if next(draws) < p else 0.0)
    return kept


@pytest.mark.parametrize("piece", [1 << 16, 40, 1])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.0), (0.6, 0.4), (0.2, 0.1)])
def test_della_is_the_loop(
    density: float, epsilon: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "PIECE", piece)
    deltas_Cmn = deltas(13, 17)
    config = DellaConfig(density=density, epsilon=epsilon, seed=5)
    rows = [sparsified(delta, client, config) for client, delta in enumerate(deltas_Cmn)]
    mean, elected = [], []
    for column in zip(*rows, strict=True):
        pairs = list(zip(WEIGHTS, column, strict=True))
        total = math.fsum(w * v for w, v in pairs)
        mean.append(total / sum(WEIGHTS))
        agreeing = [(w, v) for w, v in pairs if v * (1 if total >= 0 else -1) > 0]
        share = math.fsum(w for w, _ in agreeing)
        elected.append(math.fsum(w * v for w, v in agreeing) / share if share else 0.0)
    weights_C = torch.tensor(WEIGHTS)
    for method, expected in ((DELLA_LINEAR, mean), (DELLA, elected)):
        merged_mn = method(deltas_Cmn, weights_C, config, module="q")
        torch.testing.assert_close(merged_mn, torch.tensor(expected).view(13, 17))


def test_a_vector_is_one_row() -> None:
    config = DellaConfig(density=0.5, epsilon=0.3, seed=5)
    deltas_CD = deltas(50)
    as_row = DELLA(deltas_CD[:, None], None, config)
    assert torch.equal(DELLA(deltas_CD, None, config), as_row[0])


def test_equal_magnitudes_have_equal_chances() -> None:
    row = [0.0, 1, -1, 1, 0, 2, 0, 0]
    found_Rc = rank_probabilities(torch.tensor([row, row[::-1]]), 0.5, 0.2)
    expected = row_probabilities(row, 0.5, 0.2)
    torch.testing.assert_close(found_Rc, torch.tensor([expected, expected[::-1]]))
    for alike_Rc in (torch.ones(2, 6), torch.zeros(1, 6), torch.tensor([[3.0], [0.0]])):
        found_Rc = rank_probabilities(alike_Rc, 0.4, 0.3)
        torch.testing.assert_close(found_Rc, torch.full_like(alike_Rc, 0.4))


def test_della_is_unbiased_and_favours_large_entries() -> None:
    row = torch.tensor([[0.1, 0.2, 0.4, 0.8]])
    config = DellaConfig(density=0.5, epsilon=0.3)
    runs = torch.stack(
        [DELLA_LINEAR(row, None, config.model_copy(update={"seed": s})) for s in range(2000)]
    )
    kept = (runs != 0).float().mean(0)
    probabilities = torch.tensor([0.2, 0.4, 0.6, 0.8])
    sigma = (probabilities * (1 - probabilities) / 2000).sqrt()
    assert bool(((kept - probabilities).abs() < 5 * sigma).all())
    spread = row[0] * ((1 - probabilities) / probabilities / 2000).sqrt()
    assert bool(((runs.mean(0) - row[0]).abs() < 5 * spread).all())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"density": 0.1}, "epsilon: 0.15 around a density of 0.1"),
        ({"density": 0.9}, "lower epsilon"),
        ({"density": 1.0}, "lower epsilon"),
        ({"epsilon": -0.1}, "greater than or equal"),
    ],
)
def test_parameters_out_of_range_are_refused(values: dict[str, float], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        DellaConfig(**values)
    assert DellaConfig(density=1.0, epsilon=0).density == 1

"""TIES with a robust election against a loop, and what an attacker gets of it and of TIES."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation.methods.robust_ties import ROBUST_TIES, RobustTiesConfig
from anabranch.aggregation.methods.ties import TIES, TiesConfig

ENTRIES = 120


def honest(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common_D = torch.randn(ENTRIES, generator=generator)
    return common_D + 0.5 * torch.randn(count, ENTRIES, generator=generator)


def naive(rows: list[list[float]], weights: list[float], density: float) -> list[float]:
    trimmed = []
    for row in rows:
        last = sorted(map(abs, row), reverse=True)[max(1, int(density * len(row))) - 1]
        trimmed.append([value if abs(value) >= last else 0.0 for value in row])
    heavy = median(weights)
    weights = [min(weight, heavy) for weight in weights]
    sizes = [sum(map(abs, row)) / sum(value != 0 for value in row) for row in trimmed]
    cap = median(sizes)
    scaled = [
        [value * min(1, cap / size) for value in row]
        for row, size in zip(trimmed, sizes, strict=True)
    ]
    peak = median(max(map(abs, row)) for row in scaled)
    merged = []
    for column in zip(*scaled, strict=True):
        votes = sum(
            weight * min(size, cap) * ((value > 0) - (value < 0))
            for value, weight, size in zip(column, weights, sizes, strict=True)
        )
        sign = (votes > 0) - (votes < 0)
        agreeing = [
            (w, min(abs(v), peak)) for v, w in zip(column, weights, strict=True) if v * sign > 0
        ]
        share = sum(w for w, _ in agreeing)
        merged.append(sign * sum(w * v for w, v in agreeing) / share if agreeing else 0.0)
    return merged


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_it_is_the_loop(density: float) -> None:
    deltas_CD = honest(6) * torch.tensor([1.0, 0.5, 9, 2, 1, 1])[:, None]
    weights = [1.0, 2.0, 3.0, 1.0, 50.0, 1.0]
    config = RobustTiesConfig(density=density)
    found = ROBUST_TIES(deltas_CD, torch.tensor(weights, dtype=torch.float64), config)
    wanted = naive(deltas_CD.tolist(), weights, density)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from(["large", "one entry", "heavy", "tiny", "dense"]),
    st.integers(0, 2**31),
)
def test_fewer_than_half_turn_no_entry_on_which_honest_ones_of_one_size_agree(
    f: int, attack: str, seed: int
) -> None:
    honest_CD = honest(f + 2, seed)
    config = RobustTiesConfig(density=0.3)
    trimmed_CD = torch.where(
        honest_CD.abs() >= honest_CD.abs().sort(dim=1).values[:, -36, None], honest_CD, 0.0
    )
    sizes_C = trimmed_CD.abs().sum(1) / 36
    honest_CD = honest_CD / sizes_C[:, None]
    signs_D = trimmed_CD.sign().sum(0)
    agreed_D = signs_D.abs() == f + 2
    bad_D = -signs_D + 0.0
    weights_C = torch.ones(2 * f + 2, dtype=torch.float64)
    match attack:
        case "large":
            bad_D = bad_D * 1e20
        case "one entry":
            bad_D = bad_D * 1e-3
            bad_D[int(signs_D.abs().argmax())] *= 1e9
        case "heavy":
            weights_C[f + 2 :] = 1e9
        case "tiny":
            bad_D = bad_D * 1e-20
        case _:
            bad_D = -signs_D.sign() - (signs_D == 0).float()
    deltas_CD = torch.cat([honest_CD, bad_D.expand(f, -1)])
    merged_D = ROBUST_TIES(deltas_CD, weights_C, config)
    assert bool((merged_D * signs_D)[agreed_D].ge(0).all())
    assert float(merged_D.abs().max()) <= float(honest_CD.abs().max()) * (1 + 1e-5)
    assert torch.equal(merged_D.sign()[agreed_D], signs_D.sign()[agreed_D])


def test_one_large_contribution_elects_alone_in_ties_and_not_here() -> None:
    honest_CD = honest(6)
    attacked_CD = torch.cat([honest_CD, -100 * honest_CD.mean(0, keepdim=True)])
    clean_D = TIES(honest_CD, None, TiesConfig(density=1.0))
    ties_D = TIES(attacked_CD, None, TiesConfig(density=1.0))
    mine_D = ROBUST_TIES(attacked_CD, None, RobustTiesConfig(density=1.0))
    assert float((ties_D * clean_D < 0).float().mean()) > 0.9
    assert float((mine_D * clean_D < 0).float().mean()) < 0.1
    assert float((mine_D - clean_D).norm() / clean_D.norm()) < 0.5


def test_who_sends_nothing_has_no_size_and_balance_is_zero() -> None:
    found = ROBUST_TIES(
        torch.tensor([[2.0, 2, 0], [-2, 2, 0], [0, 0, 0]]), None, RobustTiesConfig(density=1.0)
    )
    assert found.tolist() == [0, 2, 0]
    assert ROBUST_TIES(torch.zeros(3, 4)).tolist() == [0] * 4

"""The majority vote of signs against a loop, and what nobody can do to it."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from anabranch.aggregation.methods.sign_vote import SIGN_VOTE

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64)


def test_it_is_the_loop() -> None:
    deltas_CD = torch.randn(5, 211, generator=torch.Generator().manual_seed(0))
    deltas_CD[:, ::3] = deltas_CD[:, ::3].round()
    rows = deltas_CD.tolist()
    sizes = [[abs(value) for value in row if value] for row in rows]
    step = median(sum(row) / len(row) for row in sizes)
    expected = []
    for column in zip(*rows, strict=True):
        votes = sum(
            weight * ((value > 0) - (value < 0))
            for weight, value in zip(WEIGHTS.tolist(), column, strict=True)
        )
        expected.append(step * ((votes > 0) - (votes < 0)))
    assert SIGN_VOTE(deltas_CD, WEIGHTS).tolist() == pytest.approx(expected)


def test_fewer_than_half_turn_no_entry_on_which_the_rest_agree() -> None:
    agreed_D = torch.tensor([0.1, -0.2, 0.3])
    for attack in (-1e30, 1e-30, 1e30):
        votes = torch.stack(
            [agreed_D, 2 * agreed_D, agreed_D, attack * agreed_D, attack * agreed_D]
        )
        merged_D = SIGN_VOTE(votes)
        assert torch.equal(merged_D.sign(), agreed_D.sign())
        assert 0.2 <= float(merged_D.abs().max()) <= 0.4 + 1e-6


def test_zeros_abstain_and_balance_is_zero() -> None:
    found = SIGN_VOTE(torch.tensor([[1.0, 1, 0, 0], [-3, 1, 0, -2], [0, 0, 0, 0]]))
    # The magnitudes are 1 and 2; who sends nothing has none.
    assert found.tolist() == [0, 1.5, 0, -1.5]
    assert SIGN_VOTE(torch.zeros(2, 3)).tolist() == [0, 0, 0]

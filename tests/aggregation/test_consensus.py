"""Consensus and MagMax against loops over entries, written from the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.methods.consensus import CONSENSUS, ConsensusConfig
from anabranch.aggregation.methods.magmax import MAGMAX
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC


def deltas() -> Tensor:
    return torch.randn(5, 211, generator=torch.Generator().manual_seed(0))


def naive_consensus(deltas_CD: Tensor, mask_scale: float, votes: int) -> Tensor:
    """With a base that is not zero, as the masks are defined: |θ0 − θ_t| > λ|θ_MTL − θ_t|."""
    base_D = torch.randn(deltas_CD.shape[1], dtype=torch.float64)
    merged = []
    for base, column in zip(base_D.tolist(), deltas_CD.double().T.tolist(), strict=True):
        theta_mtl = base + sum(column)
        masks = [
            abs(base - (base + tau)) > mask_scale * abs(theta_mtl - (base + tau)) for tau in column
        ]
        merged.append(sum(column) if sum(masks) >= votes else 0.0)
    return torch.tensor(merged)


@pytest.mark.parametrize("votes", [1, 2, 4])
@pytest.mark.parametrize("mask_scale", [0.0, 0.2, 0.4, 0.6, 2.0])
def test_consensus_is_the_loop(mask_scale: float, votes: int) -> None:
    deltas_CD = deltas()
    merged_D = CONSENSUS(deltas_CD, None, ConsensusConfig(mask_scale=mask_scale, votes=votes))
    torch.testing.assert_close(merged_D, naive_consensus(deltas_CD, mask_scale, votes))


def test_weights_stand_for_scaled_task_vectors() -> None:
    deltas_CD, weights_C = deltas(), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    torch.testing.assert_close(
        CONSENSUS(deltas_CD, weights_C), CONSENSUS(deltas_CD * weights_C[:, None])
    )


def test_masks_that_let_all_pass_leave_task_arithmetic() -> None:
    deltas_CD = deltas()
    config = ConsensusConfig(mask_scale=0.0, votes=5)
    assert torch.equal(CONSENSUS(deltas_CD, None, config), TASK_ARITHMETIC(deltas_CD))


def test_what_one_task_alone_changes_is_dropped() -> None:
    deltas_CD = torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert CONSENSUS(deltas_CD).tolist() == [0, 3, 0]
    assert CONSENSUS(deltas_CD, None, ConsensusConfig(votes=1)).tolist() == [5, 3, 0]


def test_votes_nobody_can_reach_are_refused() -> None:
    with pytest.raises(ValueError, match="votes: 2 of 1 contributions never agree"):
        CONSENSUS(deltas()[:1])


def test_magmax_is_the_loop() -> None:
    deltas_CD = deltas()
    expected = [max(column, key=abs) for column in deltas_CD.T.tolist()]
    assert MAGMAX(deltas_CD, torch.tensor([1.0, 9, 1, 1, 1])).tolist() == expected


def test_of_two_opposite_entries_the_positive_wins() -> None:
    deltas_CD = torch.tensor([[-2.0, 2.0, 0.0], [2.0, -2.0, -1.0]])
    assert MAGMAX(deltas_CD).tolist() == [2, 2, -1]
    assert MAGMAX(deltas_CD.flip(0)).tolist() == [2, 2, -1]

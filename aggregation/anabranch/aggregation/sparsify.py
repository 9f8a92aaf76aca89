"""Which entries of a task vector stay, and how much those that stay then count.

Shape legend: C contributions, D entries, R rows of c entries each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def trim(deltas_CD: Tensor, thresholds_C: Tensor) -> Tensor:
    """Entries whose magnitude reaches the threshold, zero for the rest [C, D], new memory.

    Entries tied with the threshold all stay, where mergekit drops some of them by position.
    """
    keep_CD = deltas_CD.abs() >= thresholds_C.to(deltas_CD.device)[:, None]
    return deltas_CD * keep_CD


def trim_band(deltas_CD: Tensor, low_C: Tensor, high_C: Tensor) -> Tensor:
    """Entries whose magnitude lies from low to high, ties with both included [C, D], new memory."""
    trimmed_CD = trim(deltas_CD, low_C)
    keep_CD = deltas_CD.abs() <= high_C.to(deltas_CD.device)[:, None]
    return trimmed_CD.mul_(keep_CD)


def drop_and_rescale(deltas_CD: Tensor, keep_CD: Tensor, density: float) -> Tensor:
    """τ · Bernoulli(density) / density: unbiased, E[result] = τ.

    mergekit rescales by ‖τ‖₁ / ‖mτ‖₁ of the tensor instead, which is not.

    Args:
        deltas_CD: Task vectors [C, D].
        keep_CD: Boolean masks [C, D].
        density: Probability with which they keep an entry.

    Returns:
        Sparse task vectors [C, D], new memory.
    """
    return (deltas_CD * keep_CD).div_(density)


def rank_probabilities(rows_Rc: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's p_keep = ρ − ε + 2ε(rank − 1)/(c − 1), rank 1 for the row's smallest magnitude.

    Equal magnitudes share the mean of their ranks, so that no entry gains by its position (mergekit
    ranks them by position). A row of one entry keeps it with probability ρ.

    Args:
        rows_Rc: Rows of one task vector [R, c].
        density: ρ.
        epsilon: ε.

    Returns:
        Probabilities [R, c], fp32.
    """
    columns = rows_Rc.shape[1]
    if columns == 1:
        return torch.full_like(rows_Rc, density)
    ordered_Rc, order_Rc = rows_Rc.abs().sort(dim=1)
    place_c = torch.arange(columns, device=rows_Rc.device)
    twice_Rc = (2 * place_c).expand_as(order_Rc)
    equal_Rc = ordered_Rc[:, 1:] == ordered_Rc[:, :-1]
    if bool(equal_Rc.any()):
        twice_Rc = _first_and_last(equal_Rc, place_c)
    # 2(rank − 1), put back where the entries are. Which of two equal ones the sort set first does
    # not show.
    twice_Rc = torch.empty_like(order_Rc).scatter_(1, order_Rc, twice_Rc)
    return twice_Rc.float().mul_(epsilon / (columns - 1)).add_(density - epsilon)


def _first_and_last(equal_Rc: Tensor, place_c: Tensor) -> Tensor:
    """For every place of a sorted row, the first plus the last place of its equals [R, c].

    Args:
        equal_Rc: Whether a place, from the second on, holds what the one before it does [R, c − 1].
        place_c: 0 to c − 1.
    """
    edge_R1 = equal_Rc.new_zeros(len(equal_Rc), 1)
    starts_Rc = torch.cat([edge_R1, equal_Rc], dim=1).logical_not_()
    ends_Rc = torch.cat([equal_Rc, edge_R1], dim=1).logical_not_()
    first_Rc = torch.where(starts_Rc, place_c, 0).cummax(dim=1).values
    last_Rc = torch.where(ends_Rc, place_c, len(place_c)).flip(1).cummin(dim=1).values.flip(1)
    return first_Rc + last_Rc

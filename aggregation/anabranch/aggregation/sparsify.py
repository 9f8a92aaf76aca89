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
    magnitudes_Rc = rows_Rc.abs()
    ordered_Rc = magnitudes_Rc.sort(dim=1).values
    # 2(rank − 1): those below, and those below or equal, less itself.
    twice_Rc = torch.searchsorted(ordered_Rc, magnitudes_Rc)
    twice_Rc += torch.searchsorted(ordered_Rc, magnitudes_Rc, right=True).sub_(1)
    return twice_Rc.float().mul_(epsilon / (columns - 1)).add_(density - epsilon)

"""Subsets of the contributions, for rules that look at all of them.

Shape legend: C contributions, S of a subset.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from anabranch.aggregation.robust.arc import check_minority

MOST_SUBSETS = 1_000_000


def best_subset(name: str, gram_CC: Tensor, f: int, score: Callable[[list[int]], float]) -> Tensor:
    """1/S for the C − f contributions of the least score, the earlier ones of equal subsets.

    Args:
        name: The rule's, for messages.
        gram_CC: Inner products of the task vectors [C, C]; only their number is read.
        f: Contributions left out.
        score: Of a subset's indices.

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: f is not below half of the contributions, or there are too many subsets.
    """
    count = len(gram_CC)
    check_minority(name, f, count)
    if math.comb(count, f) > MOST_SUBSETS:
        raise ValueError(
            f"{name}: f: {count} contributions have {math.comb(count, f):,} subsets without {f}, "
            f"more than {MOST_SUBSETS:,}; lower f, or take multi_krum or caf"
        )
    best = min((list(subset) for subset in combinations(range(count), count - f)), key=score)
    return torch.zeros(count, dtype=torch.float64).index_fill_(
        0, torch.tensor(best), 1 / (count - f)
    )

"""Ranks of entries, votes summed in integers, and the values that voted places are given.

Everything here streams over contributions: what is held of all of them at once is a stretch of
their sorted values, for the median at each place.

Shape legend: C contributions, D entries of one tensor, L entries of a stretch, G groups of equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anabranch.aggregation.chunk import PIECE
from anabranch.aggregation.whole import Whole

Vote = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``vote(entries_L, order_L, places_L, sorted_D) -> votes_L``: what a contribution says of some of
its entries, in int64: their values, where they stand, twice their place (0 for the least; equals
share the mean of theirs), and all that is ranked, ascending."""


def tally(parts: Whole, key: Callable[[Tensor], Tensor], vote: Vote) -> tuple[Tensor, Tensor]:
    """Votes on each entry, and the median of what the contributions have at each place.

    Args:
        parts: The contributions.
        key: By what entries are ranked: their values or their magnitudes [D].
        vote: What each contribution says.

    Returns:
        Sums of the votes [D], int64, and ascending medians of the sorted keys [D], fp32. Neither
        depends on the order of the contributions.
    """
    votes_D: Tensor | None = None
    curve_D: Tensor | None = None
    width = min(parts.side_by_side, max(1, parts.entries))
    # Where not all of them fit side by side, the rest of the curve is sorted for again.
    for first in range(0, max(1, parts.entries), width):
        stretches = []
        for entries_D in parts:
            sorted_D, order_D = key(entries_D).sort()
            if curve_D is None or votes_D is None:
                votes_D = torch.zeros_like(order_D)
                curve_D = torch.empty_like(sorted_D)
            if first == 0:
                for start, places_L in places(sorted_D):
                    order_L = order_D[start : start + len(places_L)]
                    said_L = vote(entries_D[order_L], order_L, places_L, sorted_D)
                    votes_D.index_add_(0, order_L, said_L)
            stretches.append(sorted_D[first : first + width].clone())
        assert curve_D is not None
        curve_D[first : first + width] = _middle(torch.stack(stretches))
    assert votes_D is not None
    assert curve_D is not None
    return votes_D, curve_D


def _middle(values_CL: Tensor) -> Tensor:
    """The median over the contributions [L]; halved before the sum, as the two may be large."""
    sorted_CL = values_CL.sort(dim=0).values
    return sorted_CL[(len(sorted_CL) - 1) // 2] / 2 + sorted_CL[len(sorted_CL) // 2] / 2


def places(sorted_D: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Twice the place of each of some sorted values, in pieces: where a piece starts, and it [L].

    The least has place 0. Equals share the mean of their places, so that none gains by where it
    stood; twice that is a whole number.
    """
    alone = not bool((sorted_D[1:] == sorted_D[:-1]).any())
    for start in range(0, len(sorted_D), PIECE):
        piece_L = sorted_D[start : start + PIECE]
        if alone:
            stop = start + len(piece_L)
            yield start, torch.arange(2 * start, 2 * stop, 2, device=piece_L.device)
        else:
            first_L = torch.searchsorted(sorted_D, piece_L)
            yield start, first_L + torch.searchsorted(sorted_D, piece_L, right=True) - 1


def by_place(curve_D: Tensor, keys_D: Tensor) -> Tensor:
    """To each entry the value of the curve at its place; equals share the mean of theirs [D].

    Args:
        curve_D: What the places are worth, from the least on, fp32.
        keys_D: What decides the places.
    """
    sorted_D, order_D = keys_D.sort()
    new_D = torch.ones_like(sorted_D, dtype=torch.bool)
    new_D[1:] = sorted_D[1:] != sorted_D[:-1]
    if not bool(new_D.all()):
        group_D = new_D.cumsum(0).sub_(1)
        sizes_G = torch.bincount(group_D)
        # Not by differences of running sums: the least values would drown in the largest.
        sums_G = torch.zeros(len(sizes_G), dtype=torch.float64, device=curve_D.device)
        sums_G.index_add_(0, group_D, curve_D.double())
        curve_D = (sums_G / sizes_G).float()[group_D]
    return torch.empty_like(curve_D).scatter_(0, order_D, curve_D)

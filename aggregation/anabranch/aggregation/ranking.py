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
    entries = parts.entries
    votes_D: Tensor | None = None
    curve_D: Tensor | None = None
    width = max(1, min(parts.side_by_side, entries))
    # Where not all of them fit side by side, the rest of the curve is sorted for again.
    for first in range(0, entries, width):
        stretch = slice(first, min(first + width, entries))
        abreast_CL: Tensor | None = None
        for row, entries_D in enumerate(parts):
            sorted_D, order_D = key(entries_D).sort()
            if abreast_CL is None:
                abreast_CL = sorted_D.new_empty(len(parts), stretch.stop - first)
            if votes_D is None or curve_D is None:
                votes_D, curve_D = torch.zeros_like(order_D), torch.empty_like(sorted_D)
            if first == 0:
                for start, places_L in places(sorted_D):
                    order_L = order_D[start : start + len(places_L)]
                    said_L = vote(entries_D[order_L], order_L, places_L, sorted_D)
                    votes_D.index_add_(0, order_L, said_L)
            abreast_CL[row] = sorted_D[stretch]
            # The next contribution, and the medians, may lie where these do.
            del sorted_D, order_D, entries_D
        assert abreast_CL is not None
        assert curve_D is not None
        _medians(abreast_CL, curve_D[stretch])
    assert votes_D is not None
    assert curve_D is not None
    return votes_D, curve_D


def _medians(abreast_CL: Tensor, out_L: Tensor) -> None:
    """Medians over the contributions, a piece at a time."""
    low, high = (len(abreast_CL) - 1) // 2, len(abreast_CL) // 2
    for values_CL, piece_L in zip(
        torch.split(abreast_CL, PIECE, dim=1), torch.split(out_L, PIECE), strict=True
    ):
        sorted_CL = values_CL.sort(dim=0).values
        # Halved before the sum: the two may be large.
        torch.add(sorted_CL[low] / 2, sorted_CL[high] / 2, out=piece_L)


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
    del sorted_D
    if not bool(new_D.all()):
        curve_D = _shared(curve_D, new_D)
    return torch.empty_like(curve_D).scatter_(0, order_D, curve_D)


def _shared(curve_D: Tensor, new_D: Tensor) -> Tensor:
    """The curve with the mean of each group of equals, which begin where ``new_D`` is true."""
    group_D = new_D.cumsum(0).sub_(1)
    sums_G = torch.zeros(int(group_D[-1]) + 1, dtype=torch.float64, device=curve_D.device)
    sizes_G = torch.zeros_like(sums_G)
    pieces = list(zip(torch.split(group_D, PIECE), torch.split(curve_D, PIECE), strict=True))
    # Not by differences of running sums: the least values would drown in the largest.
    for group_L, values_L in pieces:
        sums_G.index_add_(0, group_L, values_L.double())
        sizes_G.index_add_(0, group_L, torch.ones_like(values_L).double())
    sums_G.div_(sizes_G)
    return torch.cat([sums_G[group_L].float() for group_L, _ in pieces])

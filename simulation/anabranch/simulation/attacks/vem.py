"""VEM: the entries of a rank vote that are easiest to turn (after 2503.08976).

Shape legend: H honest contributions, f colluders, D entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.simulation.attacks.attack import Attack, AttackConfig, View


class VemConfig(AttackConfig):
    """VEM has no parameters: what it sees says which ranks to give."""


def honest_votes(honest_HD: Tensor) -> Tensor:
    """Σ s·r [D] of signed-rank voting: sign times rank of the magnitude, 1 for the least."""
    ranks_HD = honest_HD.abs().argsort(dim=1).argsort(dim=1) + 1
    return (honest_HD.sign() * ranks_HD).sum(dim=0)


def turning_ranks(needed_D: Tensor) -> Tensor:
    """Ranks [D], each of 1 to D once, that reach what as many entries as possible need.

    The entries that need least are served first, each by the least rank that is still free and
    reaches it; ranks that reach nobody go to the entries that cannot be turned. No other way of
    giving out ranks turns more: whatever does can be put in this order.

    Args:
        needed_D: The rank from which an entry turns.
    """
    order = needed_D.argsort(stable=True).tolist()
    needed = needed_D.tolist()
    ranks_D = torch.zeros(len(order), dtype=torch.int64)
    first, idle = 0, []
    for rank in range(1, len(order) + 1):
        if first < len(order) and needed[order[first]] <= rank:
            ranks_D[order[first]] = rank
            first += 1
        else:
            idle.append(rank)
    ranks_D[torch.tensor(order[first:], dtype=torch.int64)] = torch.tensor(idle, dtype=torch.int64)
    return ranks_D


def vem(view: View, config: VemConfig) -> Tensor:
    """Against the honest votes' signs, with the ranks that turn the most entries.

    f colluders turn an entry whose honest votes are below f times the rank they give it.
    Magnitudes are the median honest ones of each rank, so the norm tells nothing.
    """
    votes_D = honest_votes(view.honest)
    needed_D = votes_D.abs().div(view.colluders).floor() + 1
    curve_D = view.honest.abs().sort(dim=1).values.median(dim=0).values
    # Equal magnitudes would share a rank, and zeros abstain.
    curve_D = curve_D + torch.arange(1, view.entries + 1) * (1e-6 * float(curve_D.max()) + 1e-12)
    signs_D = torch.where(votes_D > 0, -1.0, 1.0).double()
    return signs_D * curve_D[turning_ranks(needed_D) - 1]


VEM = Attack("vem", VemConfig, vem)

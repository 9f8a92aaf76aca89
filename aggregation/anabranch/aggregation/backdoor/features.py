"""What is measured of each task vector in each module, from factors where it has them.

A product B·A is looked at through BᵀB and AAᵀ, k x k: its singular values, and the energy of its
rows and columns, need no m x n matrix. Everything is a logarithm, so that a difference is a ratio.

Shape legend: C contributions, m rows, n columns of a module, k inner rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.vectors.adapter import Adapter
from anabranch.vectors.task_vector import Delta, LowRank, held

LARGEST_SIDE = 2048
"""Dense matrices whose shorter side is longer have no spectrum taken: it would cost its cube."""

SHARE_END = 1e-3
"""Shares of energy nearer than this to 0 or 1 count as this near."""

Features = dict[str, float]
"""By name; nan where a module has none. ``spectrum``: log-odds of the first singular direction's
share of the energy. ``energy``: log of the largest singular value, or of the norm where there is no
spectrum. ``rows``, ``columns``: log of the largest row's (column's) energy over their mean.
``balance``: log of ‖change of B‖ / ‖change of A‖."""

NAMES = ("spectrum", "energy", "rows", "columns", "balance")

NONE: Features = dict.fromkeys(NAMES, math.nan)


@dataclass(frozen=True)
class Trained:
    """Norms of what training changed in one module's two factors.

    Attributes:
        b: Of B, the scaling in it.
        a: Of A.
        rank: The adapter's.
    """

    b: float
    a: float
    rank: int


def trained_factors(
    adapters: Sequence[Adapter], starts: Sequence[Adapter | None]
) -> dict[str, list[Trained]]:
    """What training changed in each module's factors, by module, one per contribution.

    Args:
        adapters: Where each ended.
        starts: Where each started; None: all of the factors is its own.
    """
    found: dict[str, list[Trained]] = {}
    for adapter, start in zip(adapters, starts, strict=True):
        for module, factors in adapter.lora.items():
            b_mr, a_rn = factors.b_mr.double(), factors.a_rn.double()
            if start is not None and start.lora[module].rank == factors.rank:
                b_mr = b_mr - start.lora[module].b_mr.double()
                a_rn = a_rn - start.lora[module].a_rn.double()
            norms = float(b_mr.norm()) * factors.scaling, float(a_rn.norm())
            found.setdefault(module, []).append(Trained(*norms, factors.rank))
    return found


def module_features(
    deltas: Sequence[Delta], trained: Sequence[Trained] | None = None
) -> list[Features]:
    """The features of one module's changes, one table per contribution.

    Shares and balances compare at one rank only: where ranks differ, those of another than the most
    common have none.

    Args:
        deltas: One change per contribution.
        trained: What training changed in the factors, where the module has some.
    """
    table = [_of_one(delta) for delta in deltas]
    ranks = [None] * len(table) if trained is None else [one.rank for one in trained]
    usual = Counter(ranks).most_common(1)[0][0]
    for row, features in enumerate(table):
        if ranks[row] != usual:
            features["spectrum"] = math.nan
        elif trained is not None and trained[row].a > 0 and trained[row].b > 0:
            features["balance"] = math.log(trained[row].b / trained[row].a)
    return table


def with_floor(
    by_module: Mapping[str, list[Features]], norms: Sequence[float]
) -> dict[str, list[Features]]:
    """The same, where no energy is below a thousandth of what a module has on average.

    Nobody else's change may be zero; one that is not shows by its energy then.

    Args:
        by_module: Features by module, one table per contribution.
        norms: ‖τ_i‖ over all modules.
    """
    middle = sorted(norm for norm in norms if norm > 0)
    if not middle:
        return dict(by_module)
    floor = math.log(1e-3 * middle[len(middle) // 2] / math.sqrt(len(by_module)))
    # nan stands for a change of zero: it is below every floor.
    return {
        module: [
            {**one, "energy": floor if not one["energy"] > floor else one["energy"]}
            for one in table
        ]
        for module, table in by_module.items()
    }


def _of_one(delta: Delta) -> Features:
    """One change's features."""
    change = held(delta)
    squares_k: Tensor | None
    if isinstance(change, LowRank):
        b_mk, a_kn = change.b_mk.double(), change.a_kn.double()
        gram_b_kk, gram_a_kk = b_mk.T @ b_mk, a_kn @ a_kn.T
        squares_k = _product_squares(gram_b_kk, gram_a_kk)
        rows_m = ((b_mk @ gram_a_kk) * b_mk).sum(1)
        columns_n = ((gram_b_kk @ a_kn) * a_kn).sum(0)
    elif change.ndim == 2:
        wide_mn = change.double()
        squared_mn = wide_mn.square()
        rows_m, columns_n = squared_mn.sum(1), squared_mn.sum(0)
        del squared_mn
        squares_k = None
        if min(change.shape) <= LARGEST_SIDE:
            short = wide_mn @ wide_mn.T if len(wide_mn) <= wide_mn.shape[1] else wide_mn.T @ wide_mn
            squares_k = torch.linalg.eigvalsh(short).clamp(min=0)
    else:
        squares_k, columns_n = None, torch.zeros(0)
        rows_m = change.flatten().double().square()
    total = float(rows_m.sum())
    if not total > 0:
        return dict(NONE)
    features = {**NONE, "rows": _peak(rows_m), "columns": _peak(columns_n)}
    if squares_k is None:
        return {**features, "energy": math.log(total) / 2}
    top = float(squares_k.max())
    share = min(max(top / float(squares_k.sum()), SHARE_END), 1 - SHARE_END)
    return {**features, "energy": math.log(top) / 2, "spectrum": math.log(share / (1 - share))}


def _product_squares(gram_b_kk: Tensor, gram_a_kk: Tensor) -> Tensor:
    """Squared singular values [k] of B·A: the eigenvalues of (AAᵀ)^½ BᵀB (AAᵀ)^½."""
    values_k, vectors_kk = torch.linalg.eigh(gram_a_kk)
    root_kk = vectors_kk * values_k.clamp(min=0).sqrt()
    squares_k: Tensor = torch.linalg.eigvalsh(root_kk.T @ gram_b_kk @ root_kk)
    return squares_k.clamp(min=0)


def _peak(energies: Tensor) -> float:
    """Log of the largest over the mean; nan where there is only one."""
    if len(energies) < 2:
        return math.nan
    return math.log(float(energies.max() / energies.mean()))

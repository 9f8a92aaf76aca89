"""Methods put together in a recipe: sparsify, seek consensus, combine.

``dare + sign + mean`` drops entries at random, leaves those that carry the elected sign, and takes
their weighted mean. Each part is a function of its own; a composition that has a name of its own,
such as TIES (``trim + sign + disjoint_mean``), is that method, with its kernels.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from pydantic import create_model
from torch import Tensor

from anabranch.aggregation.election import elected_signs, weighted_mean
from anabranch.aggregation.method import MergeMethod, MethodConfig, Scope, combine
from anabranch.aggregation.methods.breadcrumbs import BAND, BREADCRUMBS, BreadcrumbsConfig
from anabranch.aggregation.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from anabranch.aggregation.methods.consensus import CONSENSUS, ConsensusConfig, agreed
from anabranch.aggregation.methods.dare_linear import DARE_LINEAR, KEEP, DareConfig
from anabranch.aggregation.methods.dare_ties import DARE_TIES
from anabranch.aggregation.methods.della import DELLA
from anabranch.aggregation.methods.della_linear import DELLA_LINEAR, SURVIVORS, DellaConfig
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.aggregation.sparsify import drop_and_rescale, trim, trim_band
from anabranch.aggregation.statistics import Draw, Statistic


@dataclass(frozen=True)
class Sparsifier:
    """What a composition leaves of each task vector on its own.

    Attributes:
        config: Its parameters.
        keep: ``keep(deltas_CD, config, **statistics, **draws) -> kept_CD``.
        scope: As in ``MergeMethod``, like the rest.
        statistics: What it reads over the scope.
        draws: What it draws per entry.
        whole_vectors: Whether it looks at rows.
    """

    config: type[MethodConfig]
    keep: Callable[..., Tensor]
    scope: Scope
    statistics: tuple[Statistic, ...] = ()
    draws: tuple[Draw, ...] = ()
    whole_vectors: bool = False


SPARSIFIERS: Mapping[str, Sparsifier] = {
    "trim": Sparsifier(
        TiesConfig,
        lambda deltas_CD, config, *, thresholds_C: trim(deltas_CD, thresholds_C),
        "tensor",
        statistics=TIES.statistics,
    ),
    "dare": Sparsifier(
        DareConfig,
        lambda deltas_CD, config, *, keep_CD: drop_and_rescale(deltas_CD, keep_CD, config.density),
        "entry",
        draws=(KEEP,),
    ),
    "della": Sparsifier(
        DellaConfig,
        lambda deltas_CD, config, *, factors_CD: deltas_CD * factors_CD,
        "tensor",
        draws=(SURVIVORS,),
        whole_vectors=True,
    ),
    "breadcrumbs": Sparsifier(
        BreadcrumbsConfig,
        lambda deltas_CD, config, *, high_C, low_C: trim_band(deltas_CD, low_C, high_C),
        "tensor",
        statistics=BAND,
    ),
}

_NOTHING = Sparsifier(MethodConfig, lambda deltas_CD, config: deltas_CD, "entry")


def carrying_the_sign(deltas_CD: Tensor, weights_C: Tensor, config: Any) -> Tensor:
    """Entries with the sign of Σ w τ, zeros for the rest [C, D] (TIES: 2306.01708)."""
    signs_D = elected_signs(deltas_CD, weights_C)
    return torch.where(deltas_CD * signs_D > 0, deltas_CD, 0.0)


def own_to_enough(deltas_CD: Tensor, weights_C: Tensor, config: ConsensusConfig) -> Tensor:
    """Entries that enough TALL-masks hold, zeros for the rest [C, D] (2405.07813)."""
    return deltas_CD * agreed(deltas_CD, weights_C, config)


CONSENSUSES: Mapping[str, tuple[type[MethodConfig], Callable[..., Tensor]]] = {
    "sign": (MethodConfig, carrying_the_sign),
    "mask": (ConsensusConfig, own_to_enough),
}


def mean_where_any(kept_CD: Tensor, weights_C: Tensor) -> Tensor:
    """Σ w τ / Σ w over those that are not zero [D]; 0 where all are."""
    share_D = torch.zeros_like(kept_CD[0])
    for kept_D, weight in zip(kept_CD, weights_C.tolist(), strict=True):
        share_D.add_(kept_D != 0, alpha=weight)
    return combine(kept_CD, weights_C).div_(torch.where(share_D == 0, 1.0, share_D))


COMBINATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": combine,
    "mean": weighted_mean,
    "disjoint_mean": mean_where_any,
}

NAMED: Mapping[tuple[str, ...], MergeMethod] = {
    ("trim", "sign", "disjoint_mean"): TIES,
    ("dare", "mean"): DARE_LINEAR,
    ("dare", "sign", "disjoint_mean"): DARE_TIES,
    ("della", "mean"): DELLA_LINEAR,
    ("della", "sign", "disjoint_mean"): DELLA,
    ("breadcrumbs", "mean"): BREADCRUMBS,
    ("breadcrumbs", "sign", "disjoint_mean"): BREADCRUMBS_TIES,
    ("mask", "sum"): CONSENSUS,
}
"""Compositions that are methods with names of their own."""


def is_composition(method: str) -> bool:
    """Whether a recipe's method is put together here."""
    return "+" in method


@cache
def composed(method: str) -> MergeMethod:
    """The method of these parts.

    Args:
        method: ``[sparsify +] [consensus +] combine``. Its parameters are those of its parts.

    Raises:
        ValueError: Parts that are none, or are out of order.
    """
    parts = tuple(part.strip() for part in method.split("+"))
    return NAMED.get(parts) or built(parts)


def built(parts: tuple[str, ...]) -> MergeMethod:
    """The same from the parts alone."""
    rest = list(parts)
    sparsifier = SPARSIFIERS[rest.pop(0)] if rest[0] in SPARSIFIERS else _NOTHING
    agrees = CONSENSUSES[rest.pop(0)] if rest and rest[0] in CONSENSUSES else None
    if len(rest) != 1 or rest[0] not in COMBINATIONS:
        raise ValueError(
            f"method: {' + '.join(parts)} is no composition; give one of "
            f"{', '.join(SPARSIFIERS)} or none, then {' or '.join(CONSENSUSES)} or neither, then "
            f"one of {', '.join(COMBINATIONS)}"
        )
    add_up = COMBINATIONS[rest[0]]

    def merge(deltas_CD: Tensor, weights_C: Tensor, config: Any, **found: Tensor) -> Tensor:
        kept_CD = sparsifier.keep(deltas_CD, config, **found)
        if agrees is not None:
            kept_CD = agrees[1](kept_CD, weights_C, config)
        return add_up(kept_CD, weights_C)

    configs = dict.fromkeys([sparsifier.config, *([agrees[0]] if agrees else [])])
    bases = tuple(config for config in configs if config is not MethodConfig) or (MethodConfig,)
    name = " + ".join(parts)
    return MergeMethod(
        name=name,
        config=create_model(name, __base__=bases),
        scope=sparsifier.scope,
        merge=merge,
        statistics=sparsifier.statistics,
        draws=sparsifier.draws,
        whole_vectors=sparsifier.whole_vectors,
    )

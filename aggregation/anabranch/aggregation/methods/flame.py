"""FLAME: the majority's cluster, clipped to the median norm (Nguyen et al., 2101.02281).

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import (
    MergeMethod,
    MethodConfig,
    combine,
    cosines,
    inner_products,
)
from anabranch.aggregation.robust.linkage import linked
from anabranch.aggregation.robust.noise import with_noise
from anabranch.aggregation.robust.pre import norms


class FlameConfig(MethodConfig):
    """Parameters of FLAME."""

    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise on every entry, in units of the median norm (λ in the
    paper); 0 adds none. With noise the result is entries, so an adapter's goes back by an SVD."""
    seed: int = Field(0, ge=0)
    """Of the noise. Who knows it can take the noise off again."""


def admitted(gram_CC: Tensor) -> list[int]:
    """Places of the more than half of the contributions whose directions are closest, ascending.

    HDBSCAN on cosine distances, as in the paper (more than half in a cluster, single points count,
    one cluster allowed), has one cluster to find: two of more than half there cannot be. It is
    where single linkage first joins more than half, so this is all of it that is done, and no
    library is needed.

    Args:
        gram_CC: Inner products of the task vectors [C, C], fp64.
    """
    count = len(gram_CC)
    apart_CC = 1 - cosines(gram_CC)
    heights = apart_CC[*torch.triu_indices(count, count, 1)].tolist()
    for height in sorted(set(heights)):
        largest = max(linked(apart_CC <= height), key=len)
        if len(largest) > count // 2:
            return largest
    return list(range(count))


def flame_coefficients(weights_C: Tensor, gram_CC: Tensor | None, config: FlameConfig) -> Tensor:
    """Of those admitted, the mean, none of them longer than the median norm of all.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Inner products of the task vectors [C, C], fp64.
        config: Not read: noise is added afterwards.

    Returns:
        Coefficients [C], fp64.
    """
    assert gram_CC is not None
    norms_C = norms(gram_CC)
    most = float(norms_C.median())
    chosen = admitted(gram_CC)
    shares_C = torch.where(norms_C > most, most / norms_C, 1.0) / len(chosen)
    inside_C = torch.zeros(len(norms_C), dtype=torch.bool)
    inside_C[chosen] = True
    return torch.where(inside_C, shares_C, 0.0)


def flame(
    deltas_CD: Tensor, weights_C: Tensor | None = None, config: FlameConfig | None = None
) -> Tensor:
    """Clipped mean of the majority's cluster, without noise.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Not read.
        config: Not read.

    Returns:
        Merged entries [D].
    """
    gram_CC = inner_products(deltas_CD)
    coefficients_C = flame_coefficients(gram_CC[0], gram_CC, config or FlameConfig())
    return combine(deltas_CD, coefficients_C)


def _deviation(gram_CC: Tensor, config: FlameConfig) -> float:
    return config.noise * float(norms(gram_CC).median())


_WITHOUT_NOISE = MergeMethod(
    name="flame",
    config=FlameConfig,
    scope="model",
    coefficients=flame_coefficients,
    needs_gram=True,
)
_WITH_NOISE = with_noise(_WITHOUT_NOISE, _deviation)

FLAME = replace(_WITHOUT_NOISE, form=lambda config: _WITH_NOISE if config.noise else None)

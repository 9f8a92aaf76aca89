"""DARE: drop entries at random, rescale the rest (Yu et al., 2311.03099), then average.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig, combine
from anabranch.vectors.counter import bernoulli


class DareConfig(MethodConfig):
    """Parameters of the two DARE methods."""

    density: float = Field(0.2, gt=0, le=1)
    """Probability with which an entry is kept (1 − p in the paper)."""
    seed: int = 0
    """Seed of the masks. The same seed, module and position give the same mask anywhere."""


def drop_and_rescale(
    deltas_CD: Tensor, config: DareConfig, keep_CD: Tensor | None = None
) -> Tensor:
    """τ · Bernoulli(density) / density: unbiased, E[result] = τ.

    mergekit rescales by ‖τ‖₁ / ‖mτ‖₁ of the tensor instead, which is not.

    Args:
        deltas_CD: Task vectors [C, D].
        config: Density and seed.
        keep_CD: Boolean masks [C, D]; None draws them for a nameless module from position 0.

    Returns:
        Sparse task vectors [C, D], new memory.
    """
    if keep_CD is None:
        count, entries = deltas_CD.shape
        keep_CD = torch.stack(
            [
                bernoulli(config.density, entries, (config.seed, "", client), 0, deltas_CD.device)
                for client in range(count)
            ]
        )
    return (deltas_CD * keep_CD).div_(config.density)


def dare_linear(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: DareConfig,
    *,
    keep_CD: Tensor | None = None,
) -> Tensor:
    """Weighted mean of dropped and rescaled task vectors.

    Divided by Σw (mergekit's ``dare_linear`` with ``normalize: true``; its default, like PEFT's,
    does not divide).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Density and seed.
        keep_CD: Boolean masks [C, D]; None draws them.

    Returns:
        Merged entries [D].
    """
    return combine(drop_and_rescale(deltas_CD, config, keep_CD), weights_C / weights_C.sum())


DARE_LINEAR = MergeMethod(
    name="dare_linear",
    config=DareConfig,
    scope="entry",
    merge=dare_linear,
    statistics=("keep_CD",),
)

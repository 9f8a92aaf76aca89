"""DARE: drop entries at random, rescale the rest (Yu et al., 2311.03099), then average.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.chunk import PIECE, Chunk
from anabranch.aggregation.election import weighted_mean
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.sparsify import drop_and_rescale
from anabranch.aggregation.statistics import Draw


class DareConfig(MethodConfig):
    """Parameters of the two DARE methods."""

    density: float = Field(0.2, gt=0, le=1)
    """Probability with which an entry is kept (1 − p in the paper)."""
    seed: int = 0
    """Seed of the masks. The same seed, module and position give the same mask anywhere."""


def keep_masks(chunk: Chunk, config: DareConfig) -> Tensor:
    """Which entries each contribution keeps, boolean [C, D]."""
    keep_CD = torch.empty_like(chunk.deltas_CD, dtype=torch.bool)
    for client, keep_D in enumerate(keep_CD):
        # In pieces: the 64-bit words of a draw outweigh the mask they leave.
        for first in range(0, len(keep_D), PIECE):
            piece_L = keep_D[first : first + PIECE]
            piece_L.copy_(chunk.uniform(config.seed, client, first, len(piece_L)) < config.density)
    return keep_CD


KEEP = Draw("keep_CD", keep_masks)


def dare_linear(
    deltas_CD: Tensor, weights_C: Tensor, config: DareConfig, *, keep_CD: Tensor
) -> Tensor:
    """Weighted mean of dropped and rescaled task vectors.

    Divided by Σw (mergekit's ``dare_linear`` with ``normalize: true``; its default, like PEFT's,
    does not divide).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Density and seed.
        keep_CD: Boolean masks [C, D].

    Returns:
        Merged entries [D].
    """
    return weighted_mean(drop_and_rescale(deltas_CD, keep_CD, config.density), weights_C)


DARE_LINEAR = MergeMethod(
    name="dare_linear",
    config=DareConfig,
    scope="entry",
    merge=dare_linear,
    kernel="anabranch.aggregation.kernels.dare:dare_linear",
    draws=(KEEP,),
)

"""DELLA's drop by magnitude (Deep et al., 2406.11617), then the mean.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from anabranch.aggregation.chunk import PIECE, Chunk
from anabranch.aggregation.election import weighted_mean
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.sparsify import rank_probabilities
from anabranch.aggregation.statistics import Draw


class DellaConfig(MethodConfig):
    """Parameters of the two DELLA methods."""

    density: float = Field(0.5, gt=0, le=1)
    """Mean probability with which an entry is kept (ρ; 1 − p in the paper)."""
    epsilon: float = Field(0.15, ge=0)
    """A row's smallest entry is kept with probability ρ − ε, its largest with ρ + ε."""
    seed: int = 0
    """Seed of the masks. The same seed, module and position give the same draw anywhere."""

    @model_validator(mode="after")
    def _check_range(self) -> DellaConfig:
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"epsilon: {self.epsilon} around a density of {self.density} leaves (0, 1]; "
                "lower epsilon"
            )
        return self


def survivor_factors(chunk: Chunk, config: DellaConfig) -> Tensor:
    """1/p_keep where an entry survives, 0 where it does not [C, D]."""
    factors_CD = torch.empty_like(chunk.deltas_CD)
    step = max(1, PIECE // max(1, chunk.columns)) * chunk.columns
    for client, (delta_D, factor_D) in enumerate(zip(chunk.deltas_CD, factors_CD, strict=True)):
        for first in range(0, len(delta_D), max(1, step)):
            rows_Rc = delta_D[first : first + step].view(-1, chunk.columns)
            keep_L = rank_probabilities(rows_Rc, config.density, config.epsilon).flatten()
            uniform_L = chunk.uniform(config.seed, client, first, len(keep_L))
            factor_D[first : first + step] = (uniform_L < keep_L) / keep_L
    return factors_CD


SURVIVORS = Draw("factors_CD", survivor_factors)


def della_linear(
    deltas_CD: Tensor, weights_C: Tensor, config: DellaConfig, *, factors_CD: Tensor
) -> Tensor:
    """Weighted mean of task vectors whose small entries were dropped more often than large ones.

    Each survivor is divided by its own p_keep, as in the authors' code: E[result] is the mean.
    mergekit multiplies all of a tensor's survivors by ‖τ‖₁ / ‖mτ‖₁ instead. Divided by Σw
    (mergekit's ``normalize: true``).

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Not read: it matters to the draw only.
        factors_CD: 1/p_keep of the survivors, 0 for the rest [C, D].

    Returns:
        Merged entries [D].
    """
    return weighted_mean(deltas_CD * factors_CD, weights_C)


DELLA_LINEAR = MergeMethod(
    name="della_linear",
    config=DellaConfig,
    scope="tensor",
    merge=della_linear,
    kernel="anabranch.aggregation.kernels.della:della_linear",
    draws=(SURVIVORS,),
    whole_vectors=True,
)

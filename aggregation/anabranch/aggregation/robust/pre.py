"""What a pre-aggregator is: K mixtures of C contributions, decided from their inner products.

Shape legend: C contributions, K mixtures of them, D entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation.method import MethodConfig


@dataclass(frozen=True)
class PreAggregator:
    """A step before the method.

    Attributes:
        name: Name in recipes.
        config: Its parameters.
        mixing: ``mixing(gram_CC, config) -> mix_KC``: contribution i of what follows is
            Σ_c mix[i, c]·τ_c. ``gram_CC`` holds the inner products over all modules that are
            merged alike, fp64.
    """

    name: str
    config: type[MethodConfig]
    mixing: Callable[[Tensor, Any], Tensor]

    def __call__(self, deltas_CD: Tensor, config: MethodConfig | None = None) -> Tensor:
        """Mixtures [K, D] of contributions [C, D] held in memory, in fp32."""
        wide_CD = deltas_CD.double()
        mix_KC = self.mixing(wide_CD @ wide_CD.T, self.config() if config is None else config)
        return (mix_KC @ wide_CD).float()


Step = tuple[PreAggregator, MethodConfig]
"""A pre-aggregator with its parameters."""


def mixing(steps: Sequence[Step], gram_CC: Tensor) -> Tensor:
    """All steps one after the other as one map [K, C], fp64."""
    mix_KC = torch.eye(len(gram_CC), dtype=torch.float64)
    for step, config in steps:
        gram_KK = mix_KC @ gram_CC @ mix_KC.T
        mix_KC = step.mixing((gram_KK + gram_KK.T) / 2, config) @ mix_KC
    return mix_KC


def norms(gram_CC: Tensor) -> Tensor:
    """‖τ_i‖ [C] from inner products."""
    return gram_CC.diagonal().clamp(min=0).sqrt()


def scaled_down(norms_C: Tensor, threshold: float) -> Tensor:
    """The map [C, C] that scales every norm above a threshold down to it."""
    return torch.diag(torch.where(norms_C > threshold, threshold / norms_C, 1.0))

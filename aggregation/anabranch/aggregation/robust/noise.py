"""Gaussian noise on every entry of a merge, by seed and by place.

Shape legend: C contributions, D entries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.method import MergeMethod, combine
from anabranch.aggregation.statistics import Draw

_MERGED = -2
"""In place of a contribution in the name of the stream: the noise is nobody's."""


def gaussian(chunk: Chunk, config: Any) -> Tensor:
    """Standard normal numbers for the entries of a chunk [D], fp32, of the stream of ``seed``."""
    uniform_D = chunk.uniform(config.seed, _MERGED, 0, len(chunk.rows[0]))
    # Half a step up: the quantile of zero is infinite.
    normal_D: Tensor = torch.special.ndtri(uniform_D + 2.0**-54)
    return normal_D.float()


def with_noise(method: MergeMethod, deviation: Callable[[Tensor, Any], float]) -> MergeMethod:
    """A method of coefficients as one that also adds noise, and so gives entries, not factors.

    Args:
        method: One whose ``coefficients`` read the Gram matrix over the model; its configuration
            has a field ``seed``.
        deviation: ``deviation(gram_CC, config)``: the noise's standard deviation on each entry.
    """
    coefficients = method.coefficients
    assert coefficients is not None

    def merge(
        deltas_CD: Tensor, weights_C: Tensor, config: Any, *, gram_CC: Tensor, noise_D: Tensor
    ) -> Tensor:
        merged_D = combine(deltas_CD, coefficients(weights_C, gram_CC, config))
        return merged_D.add_(noise_D, alpha=deviation(gram_CC, config))

    draws = (Draw("noise_D", gaussian),)
    return replace(method, coefficients=None, merge=merge, draws=draws, form=None)

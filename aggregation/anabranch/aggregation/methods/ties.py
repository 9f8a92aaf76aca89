"""TIES: trim, elect a sign, average those that agree (Yadav et al., 2306.01708).

References disagree; this is the variant with weights in the election, as mergekit has it. PEFT
elects before weighing and divides by the count, so the two agree at unit weights only. The paper's
code trims over the whole model (``scope = "model"``) and keeps one entry more.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.magnitude import kept, tensor_thresholds
from anabranch.aggregation.method import MergeMethod, MethodConfig, combine


class TiesConfig(MethodConfig):
    """Parameters of TIES."""

    density: float = Field(0.2, gt=0, le=1)
    """Fraction of entries kept per task vector, by magnitude."""
    scope: Literal["tensor", "model"] = "tensor"
    """What the fraction is of: each module's entries, or all of the model's."""


def ties(
    deltas_CD: Tensor,
    weights_C: Tensor,
    config: TiesConfig,
    *,
    thresholds_C: Tensor | None = None,
) -> Tensor:
    """Trim by magnitude, elect a sign per entry, average the trimmed entries that carry it.

    Trimming keeps every entry at least as large as the k-th largest, k = max(1, ⌊density·D⌋):
    entries tied with the k-th all stay, where mergekit drops some of them by position. Entries
    of magnitude zero never count.

    Args:
        deltas_CD: Task vectors [C, D].
        weights_C: Weight per contribution [C], zero or more.
        config: Density; ``scope`` matters to the engine only.
        thresholds_C: k-th magnitude over the scope [C]; None takes it over these D entries.

    Returns:
        Merged entries [D]: 0 where nothing survives the trim.
    """
    if thresholds_C is None:
        count = kept(config.density, deltas_CD.shape[1])
        thresholds_C = tensor_thresholds(deltas_CD, count)
    keep_CD = deltas_CD.abs() >= thresholds_C.to(deltas_CD.device)[:, None]
    return elect_and_average(deltas_CD * keep_CD, weights_C)


def elect_and_average(trimmed_CD: Tensor, weights_C: Tensor) -> Tensor:
    """Per entry, the weighted mean of the contributions whose sign is that of Σ w τ̂.

    A sum of exactly zero elects +1 (mergekit, PEFT), and not the sign of the whole vector (the
    paper's code).

    Args:
        trimmed_CD: Task vectors after their trim or drop [C, D].
        weights_C: Weight per contribution [C], zero or more.

    Returns:
        Merged entries [D]: 0 where no contribution agrees.
    """
    signs_D = torch.where(combine(trimmed_CD, weights_C) >= 0, 1.0, -1.0)
    sum_D, share_D = torch.zeros_like(signs_D), torch.zeros_like(signs_D)
    # One contribution at a time: no [C, D] temporaries, and one order of addition however the
    # entries are chunked, which torch's own sum over C does not promise.
    for trimmed_D, weight in zip(trimmed_CD, weights_C.tolist(), strict=True):
        agreeing_D = (trimmed_D * signs_D).clamp_(min=0)
        sum_D.add_(agreeing_D, alpha=weight)
        share_D.add_(agreeing_D > 0, alpha=weight)
    return sum_D.mul_(signs_D).div_(torch.where(share_D == 0, 1.0, share_D))


TIES = MergeMethod(
    name="ties", config=TiesConfig, scope="tensor", merge=ties, statistics=("thresholds_C",)
)

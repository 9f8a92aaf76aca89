"""Divide and conquer (Shejwalkar and Houmansadr, NDSS 2021).

Shape legend: C contributions, D entries, S entries of a sample, P of a part of it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.robust.arc import check_minority


class DncConfig(MethodConfig):
    """Parameters of divide and conquer."""

    f: int = Field(1, ge=0)
    """Malicious contributions to withstand."""
    filter: float = Field(1.0, gt=0)
    """How many are dropped in each iteration, in units of f, rounded down (c in the paper)."""
    iterations: int = Field(5, ge=1)
    """Samples looked at; a contribution is merged if none of them drops it."""
    size: int = Field(10_000, ge=1)
    """Entries in one sample (b in the paper)."""
    seed: int = Field(0, ge=0)
    """Of the samples. Who knows it can hide in the entries that are not looked at."""


def sample_size(config: DncConfig) -> int:
    """Entries of all samples together."""
    return config.iterations * config.size


def dnc_coefficients(
    weights_C: Tensor, gram_CC: Tensor | None, config: DncConfig, *, sample_CS: Tensor
) -> Tensor:
    """Equal coefficients for those that stand out along the leading direction of no sample.

    The score of a contribution is its squared projection on the top right singular vector of the
    centred sample [C, P], which is λu² for the leading eigenpair of its Gram matrix [C, C]. Where
    every contribution is dropped by some sample, those dropped least often are merged.

    One direction is looked at: of several that are far away in different ones, some may stay. Put
    ``clip`` before it.

    Args:
        weights_C: Not read: a client states its own.
        gram_CC: Not read.
        config: What is dropped, and how often.
        sample_CS: Entries of all samples, taken in turn [C, S].

    Returns:
        Coefficients [C], fp64.

    Raises:
        ValueError: f is not below half of the contributions.
    """
    count = len(sample_CS)
    check_minority("dnc", config.f, count)
    dropped = min(int(config.filter * config.f), count - 1)
    times_C = torch.zeros(count, dtype=torch.int64)
    for part in range(config.iterations):
        part_CP = sample_CS[:, part :: config.iterations].double()
        if not part_CP.shape[1]:
            break
        part_CP -= part_CP.mean(dim=0)
        values_C, vectors_CC = torch.linalg.eigh(part_CP @ part_CP.T)
        scores_C = values_C[-1] * vectors_CC[:, -1].square()
        times_C[scores_C.argsort(stable=True)[count - dropped :]] += 1
    kept_C = (times_C == times_C.min()).double()
    return kept_C / kept_C.sum()


DNC = MergeMethod(
    name="dnc",
    config=DncConfig,
    scope="model",
    coefficients=dnc_coefficients,
    sample=sample_size,
)

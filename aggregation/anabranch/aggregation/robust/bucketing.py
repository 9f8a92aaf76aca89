"""Bucketing: means of random buckets (Karimireddy et al., ICLR 2022, 2006.09365).

Shape legend: C contributions, K buckets.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.robust.pre import PreAggregator


class BucketingConfig(MethodConfig):
    """Parameters of bucketing."""

    size: int = Field(2, ge=1)
    """Contributions in a bucket; the last may have fewer."""
    seed: int = Field(0, ge=0)
    """Of the order in which they are put into buckets."""


def bucketing(gram_CC: Tensor, config: BucketingConfig) -> Tensor:
    """Puts the task vectors into buckets at random and takes the mean of each.

    Args:
        gram_CC: Inner products of the task vectors [C, C]; only their number is read.
        config: Size of a bucket, and the seed.

    Returns:
        The map [K, C], fp64.
    """
    count = len(gram_CC)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    buckets = torch.split(order, config.size)
    mix_KC = torch.zeros(len(buckets), count, dtype=torch.float64)
    for row, bucket in enumerate(buckets):
        mix_KC[row, bucket] = 1 / len(bucket)
    return mix_KC


BUCKETING = PreAggregator("bucketing", BucketingConfig, bucketing)

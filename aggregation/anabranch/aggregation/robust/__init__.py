"""Robust pre-aggregation: steps before a merge method that an attacker finds hard to use.

Each is a linear map of the contributions that follows from their inner products alone, so it goes
before any method that merges entries or gives coefficients, and costs no second look at the model.
"""

from __future__ import annotations

from anabranch.aggregation.robust.alike import ALIKE
from anabranch.aggregation.robust.arc import ARC
from anabranch.aggregation.robust.bucketing import BUCKETING
from anabranch.aggregation.robust.clip import CLIP
from anabranch.aggregation.robust.dedup import DEDUP
from anabranch.aggregation.robust.nnm import NNM
from anabranch.aggregation.robust.oversized import OVERSIZED
from anabranch.aggregation.robust.pre import PreAggregator
from anabranch.aggregation.robust.unit_norm import UNIT_NORM

PRE_AGGREGATORS: tuple[PreAggregator, ...] = (
    ALIKE,
    ARC,
    BUCKETING,
    CLIP,
    DEDUP,
    NNM,
    OVERSIZED,
    UNIT_NORM,
)

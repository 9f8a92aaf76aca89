"""DARE: the draw by counter inside the loop, so that no mask is ever held.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.chunk import Chunk
from anabranch.aggregation.kernels.counter import STEPS, keys
from anabranch.aggregation.kernels.gpu.blocks import (
    added,
    entries_at,
    fp32,
    merge_rows,
    merged,
    no_sums,
    places,
)
from anabranch.aggregation.kernels.gpu.counter import drawn


def dare_linear(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.dare_linear.dare_linear`` with the masks of ``keep_masks``."""
    return _merge(chunk, weights_C / weights_C.sum(), config, False)


def dare_ties(chunk: Chunk, weights_C: Tensor, config: Any) -> Tensor:
    """``methods.dare_ties.dare_ties`` with the masks of ``keep_masks``."""
    return _merge(chunk, weights_C, config, True)


def _merge(chunk: Chunk, weights_C: Tensor, config: Any, elects: bool) -> Tensor:
    rows = chunk.rows
    return merge_rows(
        rows,
        _dare,
        fp32(weights_C, rows),
        torch.from_numpy(keys(chunk, config.seed).view("int64")).to(rows[0].device),
        chunk.start * chunk.columns,
        # k·2⁻⁵³ < density exactly where k < ⌈density·2⁵³⌉, and that product is exact.
        math.ceil(config.density * STEPS),
        config.density,
        ELECTS=elects,
    )


@triton.jit
def _dare(
    addresses: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    count: tl.tensor,
    weights: tl.tensor,
    keys: tl.tensor,
    position: tl.tensor,
    limit: tl.tensor,
    density: tl.tensor,
    ELECTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place_B = places(BLOCK)
    density_B = density + tl.zeros((BLOCK,), tl.float32)
    sums = no_sums(BLOCK)
    # Not unrolled: 64-bit words take two registers each.
    for c in tl.range(0, count):
        delta_B = entries_at(addresses, c, place_B, entries, ALIGNED)
        keeps_B = drawn(tl.load(keys + c), place_B + position) < limit
        kept_B = tl.where(keeps_B, tl.div_rn(delta_B, density_B), 0.0)
        sums = added(kept_B, tl.load(weights + c), sums, ELECTS)
    tl.store(out + place_B, merged(sums, ELECTS), mask=place_B < entries)

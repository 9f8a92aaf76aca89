"""Sparse ternary task vectors, unpacked on the GPU to two bits an entry and merged from those.

Floating-point sums by atomics would depend on who comes first. Here atomics only set bits, which is
the same in any order; a program then adds up its entries contribution by contribution, as it does
dense ones, from a sixteenth of their bytes.

Shape legend: C contributions, D entries, k kept of one, W words of 16 entries, B entries of a
block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.kernels.gpu.blocks import (
    BLOCK,
    added,
    launch,
    merged,
    no_sums,
    places,
)
from anabranch.aggregation.method import MethodConfig
from anabranch.vectors.sparse import SparseTernary


def weighted_sum(
    updates: Sequence[SparseTernary], coefficients: Sequence[float], device: torch.device
) -> Tensor:
    """``kernels.ternary.weighted_sum`` [D], on the device."""
    return _merged(updates, coefficients, device, elects=False)


def ties(
    updates: Sequence[SparseTernary],
    weights_C: Tensor,
    config: MethodConfig,
    device: torch.device,
) -> Tensor:
    """``kernels.ternary.ties`` [D], on the device."""
    return _merged(updates, weights_C.tolist(), device, elects=True)


def _merged(
    updates: Sequence[SparseTernary],
    weights: Sequence[float],
    device: torch.device,
    elects: bool,
) -> Tensor:
    entries = updates[0].entries
    merged_D, codes_CW = torch.empty(entries, device=device), _codes(updates, device)
    launch(
        _merge,
        (triton.cdiv(entries, BLOCK),),
        codes_CW,
        merged_D,
        entries,
        codes_CW.shape[1],
        len(updates),
        torch.tensor([update.scale for update in updates], device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        ELECTS=elects,
        BLOCK=BLOCK,
    )
    return merged_D


def _codes(updates: Sequence[SparseTernary], device: torch.device) -> Tensor:
    """Two bits an entry, whether it is there and whether it is negative: int32 [C, W]."""
    words = triton.cdiv(updates[0].entries, 16)
    codes_CW = torch.zeros(len(updates), words, dtype=torch.int32, device=device)
    for update, codes_W in zip(updates, codes_CW, strict=True):
        launch(
            _set,
            (triton.cdiv(update.nonzeros, BLOCK),),
            update.positions_k.to(device),
            update.negative_k.to(device).view(torch.uint8),
            codes_W,
            update.nonzeros,
            BLOCK=BLOCK,
        )
    return codes_CW


@triton.jit
def _set(
    positions: tl.tensor,
    negative: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    place_B = places(BLOCK)
    there_B = place_B < count
    position_B = tl.load(positions + place_B, mask=there_B, other=0)
    negative_B = tl.load(negative + place_B, mask=there_B, other=0).to(tl.int32)
    code_B = (1 + 2 * negative_B) << (2 * (position_B % 16)).to(tl.int32)
    tl.atomic_or(codes + position_B // 16, code_B, mask=there_B, sem="relaxed")


@triton.jit
def _merge(
    codes: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    words: tl.tensor,
    count: tl.tensor,
    values: tl.tensor,
    weights: tl.tensor,
    ELECTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place_B = places(BLOCK)
    there_B = place_B < entries
    shift_B = (2 * (place_B % 16)).to(tl.int32)
    sums = no_sums(BLOCK)
    for c in tl.range(0, count, loop_unroll_factor=4):
        word_B = tl.load(
            codes + tl.cast(c, tl.int64) * words + place_B // 16, mask=there_B, other=0
        )
        code_B = (word_B >> shift_B) & 3
        value = tl.load(values + c)
        kept_B = tl.where(code_B == 0, 0.0, tl.where(code_B == 3, -value, value))
        sums = added(kept_B, tl.load(weights + c), sums, ELECTS)
    tl.store(out + place_B, merged(sums, ELECTS), mask=there_B)

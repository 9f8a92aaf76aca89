"""What all GPU kernels are launched with and built from.

Shape legend: C contributions, D entries of a chunk, B entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.chunk import Rows

BLOCK = 1024
"""Entries of one program: four warps, eight of them in each thread."""

EXACT = {"enable_fp_fusion": False}
"""Compiler options of every kernel: nothing becomes a fused multiply-add that is not written so."""

_ALIGNED_BYTES = 16


def merge_rows(rows: Rows, kernel: Any, *arguments: Any, **constants: Any) -> Tensor:
    """One number per entry by a kernel.

    Args:
        rows: Entries of the contributions [C, D], on one device.
        kernel: ``kernel(addresses, out, entries, count, *arguments, **constants)``, compiled for
            an alignment and a block size too, writes the block of its program.
        arguments: What else it takes.
        constants: What else it is compiled for.

    Returns:
        What it wrote [D], fp32, where the entries are.
    """
    merged_D = torch.empty(len(rows[0]), device=rows[0].device)
    launch(
        kernel,
        (triton.cdiv(len(merged_D), BLOCK),),
        addresses(rows),
        merged_D,
        len(merged_D),
        len(rows),
        *arguments,
        ALIGNED=aligned(rows),
        BLOCK=BLOCK,
        **constants,
    )
    return merged_D


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    device = arguments[0].device
    there = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    if min(grid):
        with there:
            kernel[grid](*arguments, **constants, **EXACT)


def addresses(rows: Rows) -> Tensor:
    """Where each contribution's entries begin, int64 [C]. Keep ``rows`` alive meanwhile."""
    return torch.tensor([row_D.data_ptr() for row_D in rows], device=rows[0].device)


def aligned(rows: Rows) -> bool:
    """Whether four entries may be read at once."""
    return all(row_D.data_ptr() % _ALIGNED_BYTES == 0 for row_D in rows)


def fp32(numbers: Tensor | Sequence[float], like: Rows) -> Tensor:
    """Weights, thresholds and the like where the entries are [C]."""
    return torch.as_tensor(numbers).to(like[0].device, torch.float32)


@triton.jit
def places(BLOCK: tl.constexpr) -> tl.tensor:
    """Indices of the entries of this program's block, int64 [B]."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def entries_at(
    addresses: tl.tensor,
    c: tl.tensor,
    place_B: tl.tensor,
    entries: tl.tensor,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """A contribution's entries of a block, 0 beyond the last [B]."""
    row = tl.load(addresses + c).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    return tl.load(row + place_B, mask=place_B < entries, other=0.0)


@triton.jit
def no_sums(BLOCK: tl.constexpr) -> tl.tensor:
    """What ``added`` begins with: Σ w τ, then by sign what says so and what that weighs."""
    zero_B = tl.zeros((BLOCK,), tl.float32)
    return zero_B, zero_B, zero_B, zero_B, zero_B


@triton.jit
def added(kept_B: tl.tensor, weight: tl.tensor, sums: tl.tensor, ELECTS: tl.constexpr) -> tl.tensor:
    """The sums with one contribution more.

    Both signs are added up beside the vote, so that no contribution is read again once it is
    decided; those of the sign that wins are the numbers ``election.disjoint_mean`` adds.
    """
    total_B, plus_B, plus_share_B, minus_B, minus_share_B = sums
    weight_B = weight + tl.zeros_like(kept_B)
    # One without a say may hold what is not finite.
    total_B = tl.where(weight_B != 0, tl.fma(kept_B, weight_B, total_B), total_B)
    if ELECTS:
        plus_B = tl.fma(tl.maximum(kept_B, 0.0), weight_B, plus_B)
        plus_share_B += tl.where(kept_B > 0, weight_B, 0.0)
        minus_B = tl.fma(tl.maximum(-kept_B, 0.0), weight_B, minus_B)
        minus_share_B += tl.where(kept_B < 0, weight_B, 0.0)
    return total_B, plus_B, plus_share_B, minus_B, minus_share_B


@triton.jit
def merged(sums: tl.tensor, ELECTS: tl.constexpr) -> tl.tensor:
    """Σ w τ, or the mean of those whose sign won, 0 where nobody says anything [B]."""
    total_B, plus_B, plus_share_B, minus_B, minus_share_B = sums
    if ELECTS:
        wins_B = total_B >= 0
        share_B = tl.where(wins_B, plus_share_B, minus_share_B)
        total_B = tl.div_rn(
            tl.where(wins_B, plus_B, -minus_B), tl.where(share_B == 0, 1.0, share_B)
        )
    return total_B

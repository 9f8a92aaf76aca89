"""The exact k-th largest of entries that are all there, by brackets that narrow.

A sample brackets the k-th; one pass counts what lies above the bracket and, in 512 equal steps,
what lies inside; the step that holds it is the next bracket. Two passes as a rule, since one per
cent of the entries lie in the first; one more where the sample misled, which the counts show. The
entries are never sorted nor gathered, so all of them may tie.

Shape legend: K rows, D entries of a row, S entries of a sample, H steps of a bracket, B entries of
a block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from anabranch.aggregation.chunk import Rows
from anabranch.aggregation.kernels.gpu.blocks import addresses, aligned, entries_at, launch

_STEP_BITS = 9
_STEPS = 1 << _STEP_BITS
"""More would take a thread's registers: each holds its part of all counters."""

_BLOCK, _WARPS = 2048, 8

_PROGRAMS = 1024
"""Programs at most, over all rows: each adds its counts to the total once."""

_SAMPLE = 1 << 17

_DEVIATIONS = 4
"""Standard deviations of a rank in the sample by which the bracket is wider."""


def kth(rows: Rows, count: int, magnitude: bool) -> Tensor:
    """``magnitude.stream_kth`` of one chunk: [K] in fp32, on the CPU.

    Args:
        rows: values_KD, finite.
        count: Which one, from 1.
        magnitude: Whether to compare magnitudes, or entries with their sign.

    Raises:
        ValueError: Fewer than ``count`` entries.
    """
    entries = len(rows[0])
    if not 1 <= count <= entries:
        raise ValueError(f"the {count}-th largest of {entries} entries does not exist")
    top = (1 << (31 if magnitude else 32)) - 1
    brackets = _sampled(rows, count, magnitude, top)
    while wide := [row for row, (low, high) in enumerate(brackets) if low < high]:
        shifts = [_shift(*brackets[row]) for row in wide]
        read = [rows[row] for row in wide]
        counts_KH = _count(read, [brackets[row] for row in wide], shifts, magnitude)
        for row, shift, counts_H in zip(wide, shifts, counts_KH, strict=True):
            brackets[row] = _narrowed(*brackets[row], count, counts_H, shift, top)
    order_K = torch.tensor([low for low, _ in brackets])
    if not magnitude:
        order_K -= 1 << 31
        order_K ^= (order_K >> 63) & 0x7FFF_FFFF
    return order_K.to(torch.int32).view(torch.float32)


def _shift(low: int, high: int) -> int:
    """By how many bits the places in a bracket are cut to number its steps."""
    return max(0, (high - low).bit_length() - _STEP_BITS)


def _narrowed(
    low: int, high: int, count: int, counts_H: Tensor, shift: int, top: int
) -> tuple[int, int]:
    """The step of a bracket that holds the k-th, or what lies beyond it where none does."""
    above, from_top_H = int(counts_H[_STEPS]), counts_H[:_STEPS].flip(0).cumsum(0)
    if count <= above:
        return high + 1, top
    if count > above + int(from_top_H[-1]):
        return 0, low - 1
    low += (_STEPS - 1 - int(torch.searchsorted(from_top_H, count - above))) << shift
    return low, min(high, low + (1 << shift) - 1)


def _sampled(rows: Rows, count: int, magnitude: bool, top: int) -> list[tuple[int, int]]:
    """Bounds between which the k-th of each row is likely to lie, as ``_order`` numbers them."""
    stride = max(1, len(rows[0]) // _SAMPLE)
    # Adding zero makes −0 the same number as 0.
    sample_KS = torch.stack([row_D[::stride] for row_D in rows]) + 0.0
    if magnitude:
        order_KS = sample_KS.abs().view(torch.int32).long()
    else:
        bits_KS = sample_KS.view(torch.int32)
        order_KS = (bits_KS ^ ((bits_KS >> 31) & 0x7FFF_FFFF)).long() + (1 << 31)
    order_KS = order_KS.sort(dim=1, descending=True).values
    size = order_KS.shape[1]
    share = count / len(rows[0])
    margin = 1 + _DEVIATIONS * math.sqrt(size * share * (1 - share))
    first, last = math.floor(size * share - margin), math.ceil(size * share + margin)
    low_K = order_KS[:, last].tolist() if last < size else [0] * len(rows)
    high_K = order_KS[:, first].tolist() if first >= 0 else [top] * len(rows)
    return list(zip(low_K, high_K, strict=True))


def _count(
    rows: Rows, brackets: list[tuple[int, int]], shifts: list[int], magnitude: bool
) -> Tensor:
    """How many entries lie in each step of a bracket, and above it [K, H + 1], on the CPU."""
    device, entries = rows[0].device, len(rows[0])
    counts_KH = torch.zeros(len(rows), _STEPS + 1, dtype=torch.int64, device=device)
    programs = max(1, min(triton.cdiv(entries, _BLOCK), _PROGRAMS // len(rows)))
    launch(
        _count_steps,
        (programs, len(rows)),
        addresses(rows),
        entries,
        torch.tensor(brackets, device=device),
        torch.tensor(shifts, device=device),
        counts_KH,
        MAGNITUDE=magnitude,
        STEPS=_STEPS,
        ALIGNED=aligned(rows),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return counts_KH.cpu()


@triton.jit
def _count_steps(
    addresses: tl.tensor,
    entries: tl.tensor,
    brackets: tl.tensor,
    shifts: tl.tensor,
    counts: tl.tensor,
    MAGNITUDE: tl.constexpr,
    STEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    low = tl.load(brackets + 2 * row).to(tl.uint32)
    high = tl.load(brackets + 2 * row + 1).to(tl.uint32)
    shift = tl.load(shifts + row).to(tl.uint32)
    inside_H = tl.zeros((STEPS,), tl.int32)
    above = tl.zeros((1,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, entries, tl.num_programs(0) * BLOCK):
        place_B = start + tl.arange(0, BLOCK)
        order_B = _order(entries_at(addresses, row, place_B, entries, ALIGNED), MAGNITUDE)
        there_B = place_B < entries
        holds_B = there_B & (order_B >= low) & (order_B <= high)
        step_B = tl.where(holds_B, (order_B - low) >> shift, 0).to(tl.int32)
        inside_H += tl.histogram(step_B, STEPS, mask=holds_B)
        above += tl.sum((there_B & (order_B > high)).to(tl.int32), axis=0)
    counts += row * (STEPS + 1)
    step_H = tl.arange(0, STEPS)
    tl.atomic_add(counts + step_H, inside_H.to(tl.int64), mask=inside_H > 0)
    tl.atomic_add(counts + STEPS + tl.arange(0, 1), above.to(tl.int64))


@triton.jit
def _order(values_B: tl.tensor, MAGNITUDE: tl.constexpr) -> tl.tensor:
    """Numbers, or their magnitudes, as uint32 that order like them [B]."""
    bits_B = values_B.to(tl.int32, bitcast=True)
    if MAGNITUDE:
        order_B = bits_B & 0x7FFFFFFF
    else:
        bits_B = tl.where(values_B == 0, 0, bits_B)
        order_B = bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF) ^ -0x80000000
    return order_B.to(tl.uint32, bitcast=True)

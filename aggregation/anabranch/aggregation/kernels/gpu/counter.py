"""``vectors.counter`` inside a kernel: the same bits.

Shape legend: B entries of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anabranch.vectors.counter import GOLDEN, MIX_1, MIX_2

_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX_1), tl.constexpr(MIX_2)


@triton.jit
def drawn(key: tl.tensor, place_B: tl.tensor) -> tl.tensor:
    """Numbers ``place_B`` of a stream times 2⁵³: ``counter.uniform`` before it becomes fp64 [B].

    Args:
        key: ``counter.stream_key``, the int64 with its bits.
        place_B: Indices in the stream, int64.

    Returns:
        int64 [B], from 0 to 2⁵³ − 1.
    """
    x_B = (place_B + 1).to(tl.uint64) * _GOLDEN + key.to(tl.uint64, bitcast=True)
    x_B = (x_B ^ (x_B >> 30)) * _MIX_1
    x_B = (x_B ^ (x_B >> 27)) * _MIX_2
    return ((x_B ^ (x_B >> 31)) >> 11).to(tl.int64)

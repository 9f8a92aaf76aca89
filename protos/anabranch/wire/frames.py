"""How tensors are grouped into frames: by a rule that both ends apply to the same layout."""

from __future__ import annotations

import math
from collections.abc import Mapping

FRAME_ENTRIES = 1 << 20
"""Entries after which a frame closes. A frame pays for a Huffman table, 2% of a ternary payload
at 74k entries and below 1% from 262,144 on, and for some forty calls, which were half the time of
admitting 28 M entries in frames of that size. It is the unit that decoding holds in memory."""


def plan_frames(layout: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Tensor names per frame, in sorted order: a frame takes tensors until it is large enough.

    The receiver makes the plan for itself and accepts no other, so a sender cannot choose frames
    that cost much to decode.

    Args:
        layout: Names and shapes.
    """
    frames: list[list[str]] = []
    room = 0
    for name in sorted(layout):
        if room <= 0:
            frames.append([])
            room = FRAME_ENTRIES
        frames[-1].append(name)
        room -= math.prod(layout[name])
    return frames

"""Random numbers by counter: entry i of a named stream, drawn without drawing those before it.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a 64-bit mix of key + i·φ. A mask made of it is
the same however the entries are cut into chunks, on any device and any rank, and costs no bytes to
send.

Shape legend: D entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.vectors.seeding import word_digest

Stream = tuple[int, str, int]
"""Seed, module name, contribution: what names a stream."""

_SIGN = 1 << 63


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    return (word & (2 * _SIGN - 1)) - (2 * _SIGN if word & _SIGN else 0)


GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def _shift(x_D: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's keeps the sign."""
    return (x_D >> bits) & ((1 << (64 - bits)) - 1)


def stream_key(stream: Stream) -> int:
    """The word that tells a stream from others, 64 bits."""
    return int.from_bytes(word_digest(*stream)[:8], "little")


def uniform(
    count: int, stream: Stream, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers of a stream in [0, 1), in steps of 2⁻⁵³.

    Args:
        count: How many.
        stream: Which stream.
        start: Index of the first.
        device: Where.

    Returns:
        Entries ``start`` to ``start + count`` of the stream [D], fp64.
    """
    key = _signed(stream_key(stream))
    # int64 products wrap modulo 2⁶⁴ on every device, which is the arithmetic wanted.
    x_D = torch.arange(start + 1, start + 1 + count, device=device).mul_(_signed(GOLDEN)).add_(key)
    x_D = x_D.bitwise_xor_(_shift(x_D, 30)).mul_(_signed(MIX_1))
    x_D = x_D.bitwise_xor_(_shift(x_D, 27)).mul_(_signed(MIX_2))
    x_D = x_D.bitwise_xor_(_shift(x_D, 31))
    return _shift(x_D, 11).double().mul_(2.0**-53)

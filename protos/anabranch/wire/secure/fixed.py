"""Numbers as integers modulo 2^32 or 2^64, so that sums are exact and masks vanish.

Shape legend: D entries of a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger[Any]]
"""A vector modulo 2^32 or 2^64 [D]."""

LEAST_LEVELS = 256
"""Fewest steps from 0 to the clip: with fewer, rounding would be what a federation learns."""


@dataclass(frozen=True)
class FixedPoint:
    """Entries within ±clip as multiples of a power of two, with room for a sum of so many.

    The step is the smallest power of two with which the sum of ``members`` entries at the clip
    still fits into half of the ring, so that no honest sum wraps around.

    Attributes:
        clip: Largest magnitude of an entry; what is beyond is cut off there.
        bits: Width of the integers.
        members: Most vectors in a sum.

    Raises:
        ValueError: An impossible value, or too few steps are left.
    """

    clip: float
    bits: Literal[32, 64]
    members: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip is {self.clip}; give a positive number")
        if self.bits not in (32, 64):
            raise ValueError(f"bits is {self.bits}; give 32 or 64")
        if self.members < 1:
            raise ValueError(f"members is {self.members}; give at least 1")
        if Fraction(self.clip) / self.step < LEAST_LEVELS:
            raise ValueError(
                f"{self.bits} bits leave a sum of {self.members} fewer than {LEAST_LEVELS} steps "
                "to the clip; take 64 bits or smaller groups"
            )

    @cached_property
    def fraction_bits(self) -> int:
        """Binary digits after the point; negative where the clip is large."""
        levels = ((1 << (self.bits - 1)) - 1) // self.members  # the largest a single entry may be
        room = Fraction(levels) / Fraction(self.clip)
        digits = room.numerator.bit_length() - room.denominator.bit_length() + 1
        while math.ceil(Fraction(self.clip) * Fraction(2) ** digits) > levels:
            digits -= 1
        return digits

    @property
    def step(self) -> Fraction:
        """Distance of neighbouring numbers; an entry is off by at most half of it."""
        return Fraction(1, 2) ** self.fraction_bits

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of the integers, in this machine's byte order."""
        return np.dtype(f"u{self.bits // 8}")

    def encode(self, values_D: NDArray[np.floating]) -> Words:
        """Clip, round to the nearest step, and take modulo 2^bits [D].

        Raises:
            ValueError: An entry is NaN or infinite.
        """
        exact_D = values_D.astype(np.float64)
        if not np.isfinite(exact_D).all():
            raise ValueError("an entry is NaN or infinite; did the training diverge?")
        np.clip(exact_D, -self.clip, self.clip, out=exact_D)
        levels_D = np.rint(np.ldexp(exact_D, self.fraction_bits)).astype(np.int64)
        return levels_D.astype(self.dtype)

    def decode(self, total_D: Words, count: int) -> NDArray[np.float64]:
        """The sum that so many vectors made [D].

        Raises:
            ValueError: There were more of them than there is room for.
        """
        if count > self.members:
            raise ValueError(f"the sum is of {count} vectors, with room for {self.members}")
        signed_D = total_D.view(np.int32 if self.bits == 32 else np.int64)
        return np.ldexp(signed_D.astype(np.float64), -self.fraction_bits)

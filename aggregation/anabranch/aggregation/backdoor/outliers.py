"""How far each of a few numbers is from the others, when some of them are an attacker's.

Shape legend: C contributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

NORMAL = 1.4826
"""Median absolute deviations of a normal distribution in a standard deviation."""

SMALL = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129, 9: 1.107}
"""By how much the median absolute deviation of so few falls short (Croux and Rousseeuw, 1992)."""


@dataclass(frozen=True)
class Centre:
    """The middle of some numbers, and how far honest ones are from it.

    Attributes:
        median: Of those that are known.
        spread: Median absolute deviation as a standard deviation; 0 where fewer than 3 are known.
        known: How many.
    """

    median: float
    spread: float
    known: int


def centre(values_C: Sequence[float]) -> Centre:
    """Median and median absolute deviation of the numbers that are not nan."""
    known = [value for value in values_C if not math.isnan(value)]
    if len(known) < 3:
        return Centre(math.nan, 0.0, len(known))
    middle = median(known)
    deviation = median(abs(value - middle) for value in known)
    count = len(known)
    short = SMALL.get(count, count / (count - 0.8))
    return Centre(middle, NORMAL * short * deviation, count)


def scores(values_C: Sequence[float], of: Centre, spread: float) -> list[float]:
    """Distances from the median in spreads; 0 for what is not known.

    Args:
        values_C: The numbers.
        of: Their centre.
        spread: The least spread to divide by: chance makes that of a few numbers tiny.
    """
    wide = max(of.spread, spread)
    if math.isnan(of.median):
        return [0.0] * len(values_C)
    return [0.0 if math.isnan(value) else (value - of.median) / wide for value in values_C]

"""Whole tensors, one contribution at a time: what methods that rank entries are handed.

Shape legend: C contributions, D entries of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

WHOLE_COPIES = 16
"""What ranking a tensor takes, in fp32 copies of it: the entries, a sort with its 64-bit indices,
and votes and places in 64 bits."""


class Whole(Protocol):
    """One tensor of every contribution, formed when it is its turn, as often as asked."""

    @property
    def entries(self) -> int:
        """D."""
        ...

    @property
    def side_by_side(self) -> int:
        """How many entries of all contributions may be held at once, at least one."""
        ...

    def __len__(self) -> int:
        """C."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """Entries in row order [D], fp32 and finite, of one contribution after the other.

        They are not to be written to.
        """
        ...


@dataclass(frozen=True)
class InMemory:
    """A ``Whole`` of entries that are all there [C, D]."""

    deltas_CD: Tensor  # noqa: N815

    @property
    def entries(self) -> int:
        """D."""
        return self.deltas_CD.shape[1]

    @property
    def side_by_side(self) -> int:
        """All of them."""
        return max(1, self.entries)

    def __len__(self) -> int:
        """C."""
        return len(self.deltas_CD)

    def __iter__(self) -> Iterator[Tensor]:
        """One contribution's entries after the other."""
        return iter(self.deltas_CD)

"""The processes that merge one model together: whose a module is, and what all of them know.

Each rank runs the same code on its own modules. Where a method looks at the whole model it asks
here, and one rank alone gets back what it gave: there is no second way through the engine.
``engine.shard`` makes several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, distributed

Value = TypeVar("Value")

Reduction = Literal["sum", "min", "max"]

_REDUCTIONS: dict[Reduction, Callable[..., Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


class LostRankError(RuntimeError):
    """Another rank is gone, so this one cannot go on."""


@dataclass(frozen=True)
class Ranks:
    """How many processes merge together, and which of them this is.

    Every rank makes the same calls in the same order: each waits for all.

    Attributes:
        rank: Which one this is, from 0.
        count: How many there are.
        local_count: How many of them share this machine, and so a budget of memory.
    """

    rank: int = 0
    count: int = 1
    local_count: int = 1

    def mine(self, sizes_bytes: Mapping[str, int]) -> tuple[str, ...]:
        """The names that are this rank's, in order; see ``deal``."""
        return deal(sizes_bytes, self.count)[self.rank]

    def gather(self, value: Value) -> list[Value]:
        """What each rank gave, in their order, on all of them.

        Raises:
            LostRankError: One of them is gone.
        """
        if self.count == 1:
            return [value]
        found: list[Value | None] = [None] * self.count
        try:
            distributed.all_gather_object(found, value)
        except RuntimeError as error:
            raise self.lost() from error
        return found  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all ranks are here.

        Raises:
            LostRankError: One of them is gone.
        """
        self.gather(None)

    def union(self, mine: Mapping[str, Value]) -> dict[str, Value]:
        """What all ranks know by name, in the order of the names.

        Numbers that are added up afterwards round as they do on one rank.

        Raises:
            LostRankError: One of them is gone.
        """
        everyone = {name: value for part in self.gather(dict(mine)) for name, value in part.items()}
        return {name: everyone[name] for name in sorted(everyone)}

    def reduce(self, mine: Tensor | None, how: Reduction) -> Tensor:
        """A reduction over the ranks, in their order, of one tensor of each on the CPU.

        Args:
            mine: None where this rank has no modules; may be written to.
            how: What is done with two of them; integers are exact, and so are extremes.

        Raises:
            ValueError: No rank has any.
            LostRankError: One of them is gone.
        """
        total = mine if self.count == 1 else self._reduced(mine, how)
        if total is None:
            raise ValueError("no entries to gather a statistic of; give modules that have some")
        return total

    def _reduced(self, mine: Tensor | None, how: Reduction) -> Tensor | None:
        total: Tensor | None = None
        # One at a time: the counters of a k-th may be many megabytes.
        for source, facts in enumerate(
            self.gather(None if mine is None else (mine.shape, mine.dtype))
        ):
            if facts is None:
                continue
            shape, dtype = facts
            part = torch.empty(shape, dtype=dtype)
            if source == self.rank:
                assert mine is not None
                part = mine.cpu().contiguous()
            try:
                distributed.broadcast(part, source)
            except RuntimeError as error:
                raise self.lost() from error
            # Whose tensor this writes to was sent before.
            total = part if total is None else _REDUCTIONS[how](total, part, out=total)
        return total

    def budget_line(self, budget_bytes: int) -> str:
        """What this machine was allowed, of which a rank has so much, in words."""
        if self.local_count == 1:
            return str(budget_bytes)
        return f"{budget_bytes * self.local_count} over {self.local_count} ranks"

    def lost(self) -> LostRankError:
        """What this rank says once it knows that another is gone."""
        return LostRankError(f"rank {self.rank} stops: another rank died or stopped")


ALONE = Ranks()


def deal(sizes_bytes: Mapping[str, int], count: int) -> list[tuple[str, ...]]:
    """Names dealt to ranks by bytes, the largest first, each to whoever has the fewest.

    No rank gets more than 4/3 of the best there is (Graham, 1969). The same on every rank.

    Args:
        sizes_bytes: By name.
        count: How many ranks there are; those beyond the names get none.

    Returns:
        Each rank's names, sorted.
    """
    dealt: list[list[str]] = [[] for _ in range(count)]
    held = [0] * count
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        least = held.index(min(held))
        dealt[least].append(name)
        held[least] += sizes_bytes[name]
    return [tuple(sorted(names)) for names in dealt]

"""What a plan says. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["adapters", "checkpoints"]


@dataclass(frozen=True)
class PlannedGroup:
    """Modules that are merged alike.

    Attributes:
        modules: How many.
        first: One of them.
        params: The method's parameters.
        weights: Weight per contribution.
        scale: Factor on the merged task vector.
        excluded: Whether they stay as they were.
    """

    modules: int
    first: str
    params: Mapping[str, Any]
    weights: tuple[float, ...]
    scale: float
    excluded: bool


@dataclass(frozen=True)
class PlannedRank:
    """What one of several processes does.

    Attributes:
        modules: How many modules or tensors it merges and copies.
        memory_bytes: What it holds at most, on top of the libraries.
        read_bytes: Bytes it reads from files, at most.
        output_bytes: Bytes of the tensors that it writes.
    """

    modules: int
    memory_bytes: int
    read_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        kind: What is merged.
        names: The contributions that take part, in order.
        method: The merge method.
        scope: What it must see before it can decide an entry.
        modules: How many modules or tensors are merged.
        groups: Those that are merged alike, as a model of their own; one where the recipe has no
            rules and no gradients.
        copied: How many tensors are copied.
        passes: Most times a contribution's entries are gone through.
        memory_bytes: What the merge holds at most, on top of the libraries.
        read_bytes: Bytes read from files, at most.
        output_bytes: Bytes of the tensors that are written.
        ranks: What each process does of it; one where the merge is not split.
        warnings: What is odd, one line each.
    """

    kind: Kind
    names: tuple[str, ...]
    method: str
    scope: str
    modules: int
    groups: tuple[PlannedGroup, ...]
    copied: int
    passes: int
    memory_bytes: int
    read_bytes: int
    output_bytes: int
    ranks: tuple[PlannedRank, ...]
    warnings: tuple[str, ...]

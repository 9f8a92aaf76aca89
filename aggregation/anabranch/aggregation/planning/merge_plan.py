"""What a plan says. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["adapters", "checkpoints"]


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        kind: What is merged.
        names: The contributions that take part, in order.
        method: The merge method.
        scope: What it must see before it can decide an entry.
        modules: How many modules or tensors are merged.
        copied: How many tensors are copied.
        passes: Most times a contribution's entries are gone through.
        memory_bytes: What the merge holds at most, on top of the libraries.
        read_bytes: Bytes read from files, at most.
        output_bytes: Bytes of the tensors that are written.
        warnings: What is odd, one line each.
    """

    kind: Kind
    names: tuple[str, ...]
    method: str
    scope: str
    modules: int
    copied: int
    passes: int
    memory_bytes: int
    read_bytes: int
    output_bytes: int
    warnings: tuple[str, ...]

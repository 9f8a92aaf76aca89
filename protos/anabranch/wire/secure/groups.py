"""Who masks with whom: random groups that follow from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def grouped(names: Sequence[str], size: int | None, seed: str) -> list[tuple[str, ...]]:
    """Split clients into random groups of at least ``size``, as even as can be.

    Args:
        names: The clients, each once.
        size: Fewest members of a group; fewer clients than that make one group. None: one of all.
        seed: Decides the groups; the order of the names does not.

    Returns:
        The groups; names within each are in order.
    """
    shuffled = sorted(names, key=lambda name: _draw(seed, name))
    count = max(1, len(shuffled) // size) if size else 1
    return [tuple(sorted(shuffled[first::count])) for first in range(count)] if names else []


def _draw(seed: str, name: str) -> bytes:
    return hashlib.sha256(f"anabranch.groups/1\0{seed}\0{name}".encode()).digest()

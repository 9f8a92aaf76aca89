"""Who hangs together with whom: single linkage.

Shape legend: C contributions.
"""

from __future__ import annotations

from torch import Tensor


def linked(near_CC: Tensor) -> list[list[int]]:
    """Groups of contributions that reach each other from one near pair to the next.

    Args:
        near_CC: Whether two are near [C, C], bool, symmetric.

    Returns:
        Places in each group, ascending; the groups in the order of their first.
    """
    groups: list[list[int]] = []
    seen: set[int] = set()
    neighbours = [row.nonzero().flatten().tolist() for row in near_CC]
    for start in range(len(near_CC)):
        if start in seen:
            continue
        group, waiting = {start}, [start]
        while waiting:
            for other in neighbours[waiting.pop()]:
                if other not in group:
                    group.add(other)
                    waiting.append(other)
        seen |= group
        groups.append(sorted(group))
    return groups

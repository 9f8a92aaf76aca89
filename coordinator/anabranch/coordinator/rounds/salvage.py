"""Which late updates a merge that failed can do with: one that spoils it costs itself alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anabranch.coordinator.rounds.stragglers import Carried


def usable(
    late: Sequence[Carried], merges: Callable[[Sequence[Carried]], bool]
) -> list[Carried] | None:
    """The late updates that can be merged, found by halves: k that cannot cost k·log₂ merges.

    Args:
        late: Those that a merge with all of them failed with.
        merges: Whether the round's own updates can be merged with these late ones.

    Returns:
        The others, in their order; None where the own ones cannot be merged either, so that
        nothing is known of the late ones.
    """
    if not merges(()):
        return None
    kept: list[Carried] = []

    def add(part: Sequence[Carried]) -> None:
        if merges([*kept, *part]):
            kept.extend(part)
        elif len(part) > 1:
            half = len(part) // 2
            add(part[:half])
            add(part[half:])

    half = len(late) // 2
    for part in (late[:half], late[half:]) if half else ():
        add(part)
    return kept

from __future__ import annotations

from collections import Counter

import pytest

from anabranch.wire.secure.groups import grouped

NAMES = [f"client-{number}" for number in range(23)]


@pytest.mark.parametrize("size", [1, 2, 5, 7, 22, 23, 100, None])
def test_everybody_is_in_one_group_and_none_is_too_small(size: int | None) -> None:
    groups = grouped(NAMES, size, "s")
    assert Counter(name for group in groups for name in group) == Counter(NAMES)
    sizes = [len(group) for group in groups]
    assert min(sizes) >= min(size or len(NAMES), len(NAMES))
    assert max(sizes) - min(sizes) <= 1
    assert all(list(group) == sorted(group) for group in groups)


def test_the_seed_decides_and_the_order_does_not() -> None:
    assert grouped(NAMES, 4, "1") == grouped(NAMES[::-1], 4, "1")
    assert grouped(NAMES, 4, "1") != grouped(NAMES, 4, "2")
    assert grouped([], 4, "1") == []


def test_pairs_meet_as_often_as_chance_has_it() -> None:
    together = Counter(
        (NAMES[0] in group) == (NAMES[1] in group) == True  # noqa: E712
        for seed in range(2000)
        for group in grouped(NAMES[:12], 4, str(seed))
        if NAMES[0] in group
    )
    # Three of the eleven others.
    assert abs(together[True] / 2000 - 3 / 11) < 0.04

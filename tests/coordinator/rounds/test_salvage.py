"""Late updates that a merge fails with are found, and cost themselves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from anabranch.coordinator.rounds.salvage import usable
from anabranch.coordinator.rounds.stragglers import Carried
from anabranch.coordinator.store import Contribution


def late(count: int) -> list[Carried]:
    rows = (Contribution(round=1, client=f"c{n}", digest="d", size_bytes=1) for n in range(count))
    return [Carried(row, 1) for row in rows]


@given(st.integers(1, 40), st.sets(st.integers(0, 39), min_size=1))
def test_all_but_those_it_fails_with_are_kept(count: int, bad: set[int]) -> None:
    rows, tried = late(count), []
    spoilt = {f"c{number}" for number in bad if number < count} or {"c0"}

    def merges(part: Sequence[Carried]) -> bool:
        tried.append(part)
        return not any(one.row.client in spoilt for one in part)

    kept = usable(rows, merges)
    assert kept == [one for one in rows if one.row.client not in spoilt]
    assert len(tried) <= 3 + 2 * len(spoilt) * (1 + math.ceil(math.log2(count)))


def test_where_the_rounds_own_cannot_be_merged_nothing_is_known_of_the_late_ones() -> None:
    assert usable(late(3), lambda part: False) is None

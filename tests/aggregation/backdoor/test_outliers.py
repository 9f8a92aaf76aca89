from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from anabranch.aggregation.backdoor.outliers import centre, scores


def test_the_spread_of_normal_numbers_is_their_standard_deviation() -> None:
    generator = np.random.default_rng(0)
    for count in (4, 5, 8, 9, 30):
        spreads = [centre(generator.normal(7, 2, count).tolist()).spread for _ in range(4000)]
        assert statistics.fmean(spreads) == pytest.approx(2, rel=0.05), count


def test_a_few_that_are_far_away_hardly_move_the_middle() -> None:
    honest = np.random.default_rng(1).normal(0, 1, 14).tolist()
    alone, among = centre(honest), centre([*honest, *[1e9] * 6])
    assert abs(among.median - alone.median) < 1
    assert 0.3 < among.spread / alone.spread < 3
    assert scores([*honest, 1e9], among, 0.0)[-1] > 1e8


def test_what_is_not_known_scores_nothing() -> None:
    of = centre([1.0, math.nan, 2.0, 3.0])
    assert (of.median, of.known) == (2.0, 3)
    assert scores([math.nan, 2.0], of, 0.1) == [0.0, 0.0]
    assert scores([5.0, 6.0], centre([5.0, 6.0]), 0.1) == [0.0, 0.0]


def test_equal_numbers_are_divided_by_the_least_spread() -> None:
    assert scores([1.0, 1.3], centre([1.0] * 6), 0.1) == pytest.approx([0.0, 3.0])

from __future__ import annotations

import pytest
from benchmarks.harness import Row, verdict


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        ({}, ""),
        ({"ratio": 1 / 8, "reads": 25}, "met"),
        ({"ratio": 1 / 30, "reads": 25}, "missed: ratio above 0.0333"),
        ({"ratio": 1 / 30, "ours": 1}, "missed: ratio above 0.0333, ours above 1"),
    ],
)
def test_a_row_is_held_to_its_bars(most: dict[str, float], expected: str) -> None:
    row = Row("ties", ours=2.0, rival=20.0, rival_name="", scenario="", reads=25.0, most=most)
    assert verdict(row, quick=False) == expected
    assert verdict(row, quick=True) == ""


def test_a_figure_that_is_no_number_meets_no_bar() -> None:
    row = Row("e", ours=float("nan"), rival=1.0, rival_name="", scenario="", most={"ours": 1e-5})
    assert verdict(row, quick=False) == "missed: ours above 1e-05"

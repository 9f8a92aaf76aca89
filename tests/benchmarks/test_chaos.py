"""The table of faults: a row in place of the one before, and a page that says what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.chaos import PAGE, Fault, page, read, record
from pydantic import ValidationError


def test_a_fault_has_one_row_and_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    one, other = (Fault(fault=name, runs=1, outcome="completed", seconds=1.0) for name in "ab")
    record([one, other], path)
    again = one.model_copy(update={"runs": 3, "seconds": 2.25})
    record([again], path)
    assert read(path) == [again, other]
    assert page(read(path)).splitlines()[-2:] == [
        "| a | 3 | completed | 2.2 s |", "| b | 1 | completed | 1.0 s |",
    ]  # fmt: skip
    with pytest.raises(ValidationError):
        Fault(fault="a", runs=0, outcome="completed", seconds=1.0)


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text() == page(read())

"""What each fault came to: ``python -m benchmarks.chaos`` writes docs/chaos.md from the results.

The tests in ``tests/chaos`` add what they saw when ``CHAOS_RECORD`` is set, as ``make chaos`` does:
one row per fault in ``results/chaos.json``, in place of that fault's row before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

RESULTS = Path(__file__).with_name("results") / "chaos.json"
PAGE = Path(__file__).parent.parent / "docs" / "chaos.md"
HEAD = """# Faults, and what they come to

Each run is a federation of four clients with a real store, in which something breaks. After each
one the tests look at the same things: the run completes, every admitted update is counted once by
the rows and by the receipts, `anabranch verify` finds every receipt true (or, of what was damaged,
false), and no artifact is left that nothing names. "Longest" is the longest time from the fault to
the end of its run, on a busy machine of two cores. Where a part of a deployed federation is killed
(`kill -9 of …`, at any moment, one every 18 s or so), it is the longest to the end of the round
under way, in which others are killed too; the last round drains, and receipts are checked as a
chain, not by merging again.

`make chaos` runs all of it and writes this page (`python -m benchmarks.chaos`, from
`benchmarks/results/chaos.json`); `make test` runs each kind of fault once.

| fault | runs | what it came to | longest |
|---|---|---|---|
"""


class Fault(BaseModel):
    """One row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: str = Field(min_length=1)
    """What broke."""
    runs: int = Field(ge=1)
    """How often."""
    outcome: str = Field(min_length=1)
    """What it came to, in all of them."""
    seconds: float = Field(ge=0)
    """From the fault to the end of its run, the longest."""


_ROWS = TypeAdapter(list[Fault])


def read(path: Path = RESULTS) -> list[Fault]:
    """The rows that are kept."""
    return _ROWS.validate_json(path.read_bytes()) if path.exists() else []


def record(rows: Iterable[Fault], path: Path = RESULTS) -> None:
    """Keep rows, each in place of its fault's row before; new ones come last.

    Args:
        rows: What was seen.
        path: Where rows are kept.
    """
    kept = {row.fault: row for row in read(path)}
    kept.update((row.fault, row) for row in rows)
    lines = ",\n ".join(json.dumps(row.model_dump()) for row in kept.values())
    path.write_text(f"[{lines}]\n")


def page(rows: Iterable[Fault]) -> str:
    """The rows as a page."""
    return HEAD + "".join(
        f"| {row.fault} | {row.runs} | {row.outcome} | {row.seconds:.1f} s |\n" for row in rows
    )


if __name__ == "__main__":
    PAGE.write_text(page(read()))

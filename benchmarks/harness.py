"""What every benchmark shares: its arguments, its rows, where its last full result is kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anabranch.simulation.summary import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: What was measured.
        ours: Our figure.
        rival: The rival's; None where it has none.
        rival_name: Who, with its version and setting.
        ratio: ours / rival; None without a rival's figure.
        scenario: On what it was measured.
        note: How to read the figure.
        reads: Our seconds in reads of the inputs; None where that says nothing.
        detail: What the figure is made of, for programs: beside the row's own columns in JSON.
        most: Our bars at full size: the most that ``ours``, ``ratio`` or ``reads`` may be, by name.
        least: The same, the least.
    """

    what: str
    ours: float
    rival: float | None
    rival_name: str
    scenario: str
    note: str = ""
    reads: float | None = None
    detail: Mapping[str, Any] | None = None
    most: Mapping[str, float] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Our figure over the rival's."""
        return self.ours / self.rival if self.rival else None

    @property
    def missed(self) -> list[str]:
        """The bars that are not met, each as one phrase."""
        above = [
            f"{name} above {most:.3g}"
            for name, most in self.most.items()
            if not getattr(self, name) <= most
        ]
        return above + [
            f"{name} below {least:.3g}"
            for name, least in self.least.items()
            if not getattr(self, name) >= least
        ]


def verdict(row: Row, quick: bool) -> str:
    """How a row stands to its bars, which are of the full size: a quick run has none."""
    if quick or not (row.most or row.least):
        return ""
    return f"missed: {', '.join(row.missed)}" if row.missed else "met"


Measure = Callable[[bool, str | None], Iterator[Row]]
"""``measure(quick, only)`` yields rows; ``only`` is a scenario's name."""


def main(name: str, measure: Measure) -> dict[str, Any] | None:
    """Run a benchmark module: print its rows, keep a full result.

    Args:
        name: The module's name; its result goes to ``results/NAME.json``.
        measure: Does the work.

    Returns:
        The result, if it is full and kept.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller, fewer runs; not kept")
    parser.add_argument("--only", metavar="ROW", help="only this row, or this scenario")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for row in measure(options.quick, options.only):
        if options.only and options.only not in row.what and options.only not in row.scenario:
            continue
        bars = verdict(row, options.quick)
        rows.append({**asdict(row), "ratio": row.ratio, "bars": bars, **(row.detail or {})})
        if not options.json:
            reads = "" if row.reads is None else f"{row.reads:.1f} reads"
            ratio = "" if row.ratio is None else f"ratio {row.ratio:.3g}"
            rival = "" if row.rival is None else f"{row.rival_name} {row.rival:.4g}"
            ours = f"{row.scenario:<34} {row.what:<18} ours {row.ours:<9.4g}"
            print(f"{ours} {rival}  {ratio}  {reads}  {bars}".rstrip(), flush=True)
    if not rows:
        parser.error(f"--only {options.only}: no such row or scenario")
    result = {"machine": machine(), "quick": options.quick, "rows": rows}
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    if options.quick or options.only:
        return None
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result

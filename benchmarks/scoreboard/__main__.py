"""Who withstands what: merge rules against attackers.

Block A: vectors, minutes on one core. Block B: a small model trained in a federation. Block C: LoRA
on a pretrained model, with backdoors, in one round whose replies are trained once and kept. Every
finished cell is kept under ``runs/scoreboard``, so that a stopped run goes on where it was and a
new rule costs its own cells only. A full result goes to
``benchmarks/results/scoreboard-BLOCK.json``; ``docs/scoreboard.md`` and its heat maps are made of
those.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.scoreboard.blocks import BLOCKS, Options
from benchmarks.scoreboard.cells import Progress
from benchmarks.scoreboard.page import write_pages

ROOT = Path(__file__).parents[2]


@contextmanager
def bar(block: str) -> Iterator[Progress]:
    """A bar of the cells that are there, beside what is printed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(f"block {block}: cells", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoreboard", description=__doc__)
    parser.add_argument("--block", choices=sorted(BLOCKS), required=True)
    parser.add_argument("--quick", action="store_true", help="one seed, few rules; not kept")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; all cores by default"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N repetitions alone")
    parser.add_argument(
        "--only",
        metavar="NAME",
        help="measure this rule or attack alone; the result holds all kept",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="block C: federations of N rounds, two attackers, one seed; name a rule by --only",
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "scoreboard")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    for name in ("workers", "seeds", "rounds"):
        number = getattr(given, name)
        if number is not None and number < 1:
            parser.error(f"--{name} {number}: at least one")
    block = BLOCKS[given.block]
    with bar(given.block) as progress:
        options = Options(
            given.runs,
            given.quick,
            given.workers,
            given.seeds,
            given.only,
            progress,
            given.rounds if given.block == "C" else None,
        )
        result = block.run(options)
    if given.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print(block.text(result))
    if given.rounds is not None and given.block == "C":
        path = RESULTS / f"scoreboard-C-{given.rounds}-rounds.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    elif not given.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"scoreboard-{given.block}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        write_pages(RESULTS, ROOT / "docs")


if __name__ == "__main__":
    main()

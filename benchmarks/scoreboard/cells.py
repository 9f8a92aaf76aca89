"""Cells: one rule against one attack, measured once and kept, so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

Found = dict[str, Any]
"""What was measured; of a cell that cannot be, ``na`` with the reason."""

Progress = Callable[[int, int], None]
"""``progress(done, total)``."""


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement.

    Attributes:
        rule: Name of the merge rule.
        attack: Name of the attack; ``none`` where nobody attacks.
        f: How many attack.
        declared: How many the rule was told of.
        seed: Draws everything.
        where: A condition besides, such as how data are spread; empty in blocks without.
    """

    rule: str
    attack: str
    f: int
    declared: int
    seed: int
    where: str = ""

    @property
    def file(self) -> str:
        """Its file's name: readable, and of no two cells the same."""
        words = f"{self.where} {self.rule} {self.attack} {self.f} as {self.declared} {self.seed}"
        plain = "".join(letter if letter.isalnum() else "-" for letter in words.strip())
        return f"{plain}-{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}.json"


Measure = Callable[[Cell], Found]
"""Measures a cell in any process; a ``ValueError`` is why it cannot be."""


class Kept:
    """Finished cells in a folder, one file each.

    Args:
        runs: Where all runs are kept.
        block: ``A``, ``B`` or ``C``.
        setting: What the cells depend on besides their names; another setting has another folder.
    """

    def __init__(self, runs: Path, block: str, setting: Mapping[str, Any]) -> None:
        said = json.dumps(setting, sort_keys=True).encode()
        self.folder = runs / f"{block}-{hashlib.sha256(said).hexdigest()[:12]}"

    def get(self, cell: Cell) -> Found | None:
        """What was found; None of a cell that is not finished."""
        path = self.folder / cell.file
        if not path.exists():
            return None
        found: Found = json.loads(path.read_text())["found"]
        return found

    def put(self, cell: Cell, found: Found) -> None:
        """Keep a finished cell: whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / cell.file
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"cell": asdict(cell), "found": found}))
        partial.replace(path)


def measured(measure: Measure, cell: Cell) -> Found:
    """A cell, or why it cannot be."""
    try:
        return measure(cell)
    except ValueError as error:
        return {"na": str(error)}


def _several(measure: Measure, kept: Kept, cells: Sequence[Cell]) -> list[tuple[Cell, Found]]:
    """Measure and keep some, each as soon as it is there."""
    found = []
    for cell in cells:
        found.append((cell, measured(measure, cell)))
        kept.put(*found[-1])
    return found


def run(
    measure: Measure,
    cells: Sequence[Cell],
    kept: Kept,
    *,
    workers: int = 1,
    batch: int = 1,
    progress: Progress = lambda done, total: None,
) -> dict[Cell, Found]:
    """Measure what is not kept yet.

    Args:
        measure: Measures one; with several workers a function that can be imported.
        cells: All that is wanted.
        kept: Finished ones.
        workers: Processes; 1 stays in this one.
        batch: Cells handed to a process at a time: many where one takes milliseconds.
        progress: Told of every cell that is there.

    Returns:
        What was found, by cell, in the order asked for.
    """
    found = {cell: there for cell in cells if (there := kept.get(cell)) is not None}
    missing = [cell for cell in cells if cell not in found]
    progress(len(found), len(cells))
    for cell, result in _measure_all(measure, kept, missing, workers, batch):
        found[cell] = result
        progress(len(found), len(cells))
    return {cell: found[cell] for cell in cells}


def _measure_all(
    measure: Measure, kept: Kept, cells: Sequence[Cell], workers: int, batch: int
) -> Iterator[tuple[Cell, Found]]:
    if workers == 1 or not cells:
        for cell in cells:
            yield from _several(measure, kept, [cell])
        return
    batches = [cells[first : first + batch] for first in range(0, len(cells), batch)]
    # Not forked: a copy of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=one_thread) as pool:
        begun = [pool.submit(_several, measure, kept, some) for some in batches]
        for done in as_completed(begun):
            yield from done.result()


def one_thread() -> None:
    """Each process on one thread: several of them share the cores. Said before torch is loaded."""
    os.environ["OMP_NUM_THREADS"] = "1"

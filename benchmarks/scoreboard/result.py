"""From cells to a block's result: means over seeds, what nobody's attack costs, and the worst."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from benchmarks.scoreboard.cells import Cell, Found

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % by degrees of freedom, from 1."""


def interval(values: list[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean; None of a single value."""
    if len(values) < 2:
        return None
    student = T_975[min(len(values) - 1, len(T_975)) - 1]
    return digits(student * stdev(values) / sqrt(len(values)))


def digits(value: float) -> float:
    """Five digits: more would be of the draw."""
    return float(f"{value:.5g}")


def over_seeds(found: Mapping[Cell, Found]) -> list[dict[str, Any]]:
    """One entry per rule, attack, f, declared f and condition: figures averaged over the seeds.

    An entry has ``seeds`` (the figures by name, seed after seed), their means under their own
    names and ``ci95``, half the interval by name; or ``na``, why it cannot be.
    """
    groups: dict[tuple[str, str, str, int, int], list[Found]] = {}
    for cell, one in found.items():
        key = (cell.where, cell.rule, cell.attack, cell.f, cell.declared)
        groups.setdefault(key, []).append(one)
    entries = []
    for (where, rule, attack, f, declared), several in groups.items():
        entry: dict[str, Any] = {"rule": rule, "attack": attack, "f": f, "declared": declared}
        if where:
            entry["where"] = where
        reasons = [one["na"] for one in several if "na" in one]
        if reasons:
            entries.append({**entry, "na": reasons[0]})
            continue
        seeds = {name: [float(one[name]) for one in several] for name in several[0]}
        entry |= {name: digits(fmean(values)) for name, values in seeds.items()}
        entry["ci95"] = {name: interval(values) for name, values in seeds.items()}
        shown = {name: [digits(value) for value in values] for name, values in seeds.items()}
        entries.append({**entry, "seeds": shown})
    return entries


def worst(entries: Iterable[Mapping[str, Any]], figure: str) -> Mapping[str, Any] | None:
    """The entry with the largest mean; None where there is none, or one cannot be."""
    several = list(entries)
    if not several or any("na" in entry for entry in several):
        return None
    return max(several, key=lambda entry: float(entry[figure]))


def by_rule(entries: Iterable[Mapping[str, Any]], figure: str) -> dict[str, dict[str, Any]]:
    """What each rule comes to.

    Returns:
        By rule: ``tax``, the figure where nobody attacks; ``worst``, by f the attack that hurts
        most and its figure; ``misjudged``, the same by "f told declared"; None where one cannot be.
    """
    rules: dict[str, dict[str, Any]] = {}
    cells: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for entry in entries:
        cells.setdefault((entry["rule"], entry["f"], entry["declared"]), []).append(entry)
    for (rule, f, declared), several in cells.items():
        row = rules.setdefault(rule, {"tax": None, "worst": {}, "misjudged": {}})
        hurt = worst(several, figure)
        said = None if hurt is None else {"attack": hurt["attack"], figure: hurt[figure]}
        if f == declared == 0:
            row["tax"] = None if hurt is None else hurt[figure]
        elif f == declared:
            row["worst"][str(f)] = said
        else:
            row["misjudged"][f"{f} told {declared}"] = said
    return rules

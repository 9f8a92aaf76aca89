"""``docs/scoreboard.md`` and its heat maps, out of the kept results and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scoreboard import heat

HEAD = """# Who withstands what

Written by `make scoreboard` (`python -m benchmarks.scoreboard --block A`) out of
`benchmarks/results/scoreboard-*.json`; do not edit. Every cell stands in
[scoreboard.html](scoreboard.html). No rule is tuned to a cell: parameters are defaults, and all a
rule is told is how many attack. n/a: the rule refuses so many attackers of so many; why stands in
the HTML table.
"""

BLOCK_A = """
## A. Vectors

{contributions} contributions of {entries:,} entries, f of them attackers; the honest ones share a
mean as long as their spread, and disagree half in {directions} directions, half in all. A cell is
κ̂ = ‖R − μ_H‖² / mean ‖x_i − μ_H‖²: 0 is the mean of the honest ones, 1 is as far from it as they
are. {seeds} seeds. *Worst* is the largest mean over the attacks, with its name: sign flip, ALIE
(z = 1.5), IPM (ε = .1 and 2), Min-Max, Min-Sum, Mimic, and an adaptive one, which asks the rule
itself what direction and distance hurt most. *f = 0* is what a rule costs where nobody attacks.

{table}

The adaptive attack looks along three directions (the mean, its signs, the deviations): what it
finds is what a rule *at least* gives way.

{notes}

![κ̂ by rule, attack and number of attackers](scoreboard-A.png)

### Told wrong

Worst κ̂ of our rules where f attack and the rule was told otherwise; those that are told nothing
are left out.

{misjudged}

### What it costs

{cost}
"""


BLOCK_B = """
## B. A small model

A federation of {clients} clients on the synthetic task, {rounds} rounds, LoRA, f of them attackers:
block A's attacks on what clients send, and label flip, free-riders, Sybils and VEM besides. A cell
is how much accuracy the final round lacks, in points, beside the same federation with everybody
honest and a plain mean (CAD). {seeds} seeds. *Worst* is the largest mean over the attacks, with its
name.

{tables}
"""

BLOCK_C = """
## C. Backdoors on a pretrained model

{clients} clients share a sentiment task of real texts and train LoRA on all-MiniLM-L6-v2. A cell is
by how many points the trigger's success lies above the clean floor: what a federation of the honest
clients alone, merged by their mean, does with the same trigger. {seeds} seeds.

{table}

{figures}

![Success above the floor](scoreboard-C.png)
"""


def write_pages(results: Path, docs: Path) -> None:
    """The page and the maps of every block that has a result.

    Args:
        results: Folder of ``scoreboard-BLOCK.json``.
        docs: Where ``scoreboard.md``, ``scoreboard.html`` and a PNG per map go.
    """
    text, heats = HEAD, []
    for letter, (write, maps) in PARTS.items():
        path = results / f"scoreboard-{letter}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        text += write(result)
        for name, drawn in maps(result).items():
            heat.draw(drawn, docs / f"{name}.png")
            heats.append(drawn)
    (docs / "scoreboard.md").write_text(text)
    heat.write_html(heats, docs / "scoreboard.html")


def maps_a(result: Mapping[str, Any]) -> dict[str, heat.Heat]:
    """Block A's heat map, by the name of its file."""
    title = "A. κ̂: distance from the honest mean, in honest spreads"
    return {"scoreboard-A": heat.of(result, title, (0.01, 10.0, True))}


def maps_b(result: Mapping[str, Any]) -> dict[str, heat.Heat]:
    """One for each condition."""
    return {
        _file_of(where): heat.of(
            _in_points(result), f"B. Accuracy lost, in points: {where}", (0.0, 30.0, False), where
        )
        for where in _conditions(result)
    }


def maps_c(result: Mapping[str, Any]) -> dict[str, heat.Heat]:
    """Block C's."""
    title = "C. Success of the trigger above the clean floor, in points"
    return {"scoreboard-C": heat.of(result, title, (0.0, 60.0, False))}


def _conditions(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["where"] for entry in result["cells"]))


def _file_of(where: str) -> str:
    plain = "".join(letter for letter in where if letter.isalnum())
    return f"scoreboard-B-{plain}"


def _in_points(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the figure, its interval and the summaries times 100."""
    figure = result["figure"]

    def entry(one: Mapping[str, Any]) -> dict[str, Any]:
        if "na" in one:
            return dict(one)
        error = one["ci95"][figure]
        points = None if error is None else 100 * error
        return {**one, figure: 100 * one[figure], "ci95": {figure: points}}

    return {**result, "cells": [entry(one) for one in result["cells"]]}


def block_b(result: Mapping[str, Any]) -> str:
    """Block B's part of the page."""
    setting = result["setting"]
    tables = []
    for where in _conditions(result):
        rows = [row for row in result["rules"] if row["where"] == where]
        table = _by_attackers(rows, setting["attackers"], result["figure"], 100.0)
        tables.append(f"### {where}\n\n{table}\n\n![CAD, {where}]({_file_of(where)}.png)")
    return BLOCK_B.format(
        clients=setting["clients"],
        rounds=setting["rounds"],
        seeds=len(setting["seeds"]),
        tables="\n\n".join(tables),
    )


def block_c(result: Mapping[str, Any]) -> str:
    """Block C's part of the page."""
    setting = result["setting"]
    rows = [["rule", "attack", "f", "accuracy", "oracle's", "success", "floor"]]
    for entry in result["cells"]:
        names = ("acc", "oracle_acc", "asr", "floor_asr")
        shown = ["n/a"] * 4 if "na" in entry else [f"{entry[name]:.1f}" for name in names]
        rows.append([entry["rule"], entry["attack"], str(entry["f"]), *shown])
    return BLOCK_C.format(
        clients=setting["clients"],
        seeds=len(setting["seeds"]),
        table=_by_attackers(result["rules"], setting["attackers"], result["figure"], 1.0),
        figures=markdown(rows),
    )


def _by_attackers(
    rules: Sequence[Mapping[str, Any]], attackers: Sequence[int], figure: str, unit: float
) -> str:
    """Tax and worst attack by number of attackers, a row for each rule."""
    fs = [str(f) for f in attackers if f]
    taxed = 0 in attackers
    rows = [["rule", *(["f = 0"] if taxed else []), *(f"worst, f = {f}" for f in fs)]]
    for row in rules:
        tax = None if row["tax"] is None else unit * row["tax"]
        said = [_worst(row["worst"].get(f), figure, unit) for f in fs]
        rows.append([row["rule"], *([heat.shown(tax)] if taxed else []), *said])
    return markdown(rows)


def block_a(result: Mapping[str, Any]) -> str:
    """Block A's part of the page."""
    rules, setting = result["rules"], result["setting"]
    told = [f"{f} told {declared}" for f, declared in setting["misjudged"]]
    misjudged = [["rule", *told]]
    misjudged += [
        [row["rule"], *(_worst(row["misjudged"].get(pair), result["figure"], 1.0) for pair in told)]
        for row in rules
        if row["misjudged"]
    ]
    notes = [f"- {row['rule']}: {row['note']}." for row in rules if row["note"]]
    return BLOCK_A.format(
        contributions=setting["contributions"],
        entries=setting["entries"],
        directions=setting["directions"],
        seeds=len(setting["seeds"]),
        table=_by_attackers(rules, setting["attackers"], result["figure"], 1.0),
        misjudged=markdown(misjudged),
        notes="\n".join(notes),
        cost=_cost(rules),
    )


def _worst(said: Mapping[str, Any] | None, figure: str, unit: float) -> str:
    return "n/a" if said is None else f"{heat.shown(unit * said[figure])} {said['attack']}"


def _cost(rules: list[dict[str, Any]]) -> str:
    priced = [row for row in rules if "seconds" in row]
    if not priced:
        return "Not measured."
    rows = [["rule", "seconds", "peak MiB"]]
    for row in rules:
        figures = ["n/a", "n/a"]
        if "seconds" in row:
            figures = [f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        rows.append([row["rule"], *figures])
    said = (
        "20 contributions of 1,000,000 entries, 4 declared; processor seconds on one thread, and\n"
        "peak memory beside the contributions' own 76 MiB. Flower's include turning messages into\n"
        "arrays, which it cannot do without. n/a: not measured.\n\n"
    )
    return said + markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table: the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


PARTS: Mapping[
    str,
    tuple[
        Callable[[Mapping[str, Any]], str], Callable[[Mapping[str, Any]], Mapping[str, heat.Heat]]
    ],
] = {"A": (block_a, maps_a), "B": (block_b, maps_b), "C": (block_c, maps_c)}
"""How each block is written, and what is drawn of it."""

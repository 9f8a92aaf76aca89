"""``docs/scoreboard.md`` and its heat maps, out of the kept results and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scoreboard import heat
from benchmarks.scoreboard.result import worst

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

{clients} clients share a sentiment task of real texts (Dirichlet {alpha} over the labels) and train
LoRA on the upper {upper} layers of all-MiniLM-L6-v2, and a head. One-shot: training on everybody's
data and {warm} honest round(s) make a start; in the next round f clients attack, and every recipe
merges the same replies. So the table says what a recipe lets in per round, not what many rounds add
up to (`--rounds N` does). *Success* is the share of held-out texts of the other label that the
trigger turns; the *floor* is what the mean of the honest clients alone does with the same trigger,
and *lost* how far accuracy is below that mean's, both in points. {texts} held-out texts and {seeds}
seeds, so a success rate has a standard error of two to three points. VEM and sign flip have no
trigger, and are asked for the backdoor's. *Unscaled* is the backdoor at the length that training
gave it; unscaled DBA is what the default was known not to see when it was chosen. n/a here:
refused, or not against every attack measured yet.

{table}

![Success above the floor](scoreboard-C.png)

![Accuracy lost](scoreboard-C-lost.png)

### Does the default hold?

The aim: with {low} attackers of {clients}, success at most 5 points above the floor and at most 2
points of accuracy lost; with {high}, 15 and 4; with nobody malicious, 1 point of accuracy. Means
over the seeds; ± is half of the 95 % interval.

{held}

### Every cell

{figures}
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
    success = "C. Success of the trigger above the clean floor, in points"
    lost = "C. Accuracy below that of the honest mean, in points"
    return {
        "scoreboard-C": heat.of(result, success, (0.0, 60.0, False)),
        "scoreboard-C-lost": heat.of({**result, "figure": "lost"}, lost, (0.0, 15.0, False)),
    }


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
    fs, task = setting["attackers"], setting["task"]
    rows = [["rule", "attack", "f", "accuracy", "oracle's", "success", "floor"]]
    for entry in result["cells"]:
        names = ("acc", "oracle_acc", "asr", "floor_asr")
        shown = ["n/a"] * 4 if "na" in entry else [f"{entry[name]:.1f}" for name in names]
        rows.append([entry["rule"], entry["attack"], str(entry["f"]), *shown])
    return BLOCK_C.format(
        clients=setting["clients"],
        alpha=task.get("partition", {}).get("alpha", "none"),
        upper=task.get("upper_layers", "no"),
        warm=setting["warm"],
        texts=task.get(f"{setting['split']}_examples", "All"),
        seeds=len(setting["seeds"]),
        low=fs[len(fs) // 2],
        high=fs[-1],
        table=_success_and_lost(result),
        held=_held(result, {0: (5.0, 1.0), fs[len(fs) // 2]: (5.0, 2.0), fs[-1]: (15.0, 4.0)}),
        figures=markdown(rows),
    )


def _success_and_lost(result: Mapping[str, Any]) -> str:
    """Worst success and worst loss by number of attackers, a row for each rule."""
    fs = result["setting"]["attackers"]
    rows = [
        ["rule", "lost, f = 0", *(f"success, f = {f}" for f in fs), *(f"lost, f = {f}" for f in fs)]
    ]
    for rule in dict.fromkeys(entry["rule"] for entry in result["cells"]):
        mine = [entry for entry in result["cells"] if entry["rule"] == rule]
        row = [rule]
        for figure, f in (("lost", 0), *(("gain", f) for f in fs), *(("lost", f) for f in fs)):
            there = [entry for entry in mine if entry["f"] == f]
            # The worst of some attacks would read as that of all.
            whole = not f or {*result["attacks"]} <= {entry["attack"] for entry in there}
            hurt = worst(there, figure) if whole else None
            said = "n/a" if hurt is None else f"{hurt[figure]:.1f}"
            row.append(said if hurt is None or not f else f"{said} {hurt['attack']}")
        rows.append(row)
    return markdown(rows)


def _held(result: Mapping[str, Any], aims: Mapping[int, tuple[float, float]]) -> str:
    """The default's cells beside what is asked of them."""
    rows = [["attack", "f", "success above the floor", "accuracy lost", "holds"]]
    for entry in result["cells"]:
        if entry["rule"] != "robust" or entry["f"] not in aims or "na" in entry:
            continue
        most = aims[entry["f"]]
        names = [name for name, aim in zip(("success", "accuracy"), most, strict=True)
                 if entry["gain" if name == "success" else "lost"] > aim]  # fmt: skip
        figures = []
        for name in ("gain", "lost"):
            error = entry["ci95"][name]
            figures.append(f"{entry[name]:.1f}" + ("" if error is None else f" ± {error:.1f}"))
        held = "yes" if not names else f"no: {' and '.join(names)}"
        rows.append([entry["attack"], str(entry["f"]), *figures, held])
    return markdown(rows)


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

"""``docs/scoreboard.md`` and its heat maps, out of the kept results and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

TIES and the sign vote do not estimate the mean, so this figure counts their own scale against them.
{notes}

![κ̂ by rule, attack and number of attackers](scoreboard-A.png)

### Told wrong

Worst κ̂ of our rules where f attack and the rule was told otherwise; those that are told nothing
are left out.

{misjudged}

### What it costs

{cost}
"""


def write_pages(results: Path, docs: Path) -> None:
    """The page and the maps of every block that has a result.

    Args:
        results: Folder of ``scoreboard-BLOCK.json``.
        docs: Where ``scoreboard.md``, ``scoreboard.html`` and a PNG per map go.
    """
    text, heats = HEAD, []
    path = results / "scoreboard-A.json"
    if path.exists():
        result = json.loads(path.read_text())
        text += block_a(result)
        title = "A. κ̂: distance from the honest mean, in honest spreads"
        drawn = heat.of(result, title, (0.01, 10.0, True))
        heat.draw(drawn, docs / "scoreboard-A.png")
        heats.append(drawn)
    (docs / "scoreboard.md").write_text(text)
    heat.write_html(heats, docs / "scoreboard.html")


def block_a(result: Mapping[str, Any]) -> str:
    """Block A's part of the page."""
    rules, setting = result["rules"], result["setting"]
    fs = [str(f) for f in setting["attackers"] if f]
    rows = [["rule", "f = 0", *(f"worst, f = {f}" for f in fs)]]
    rows += [
        [row["rule"], heat.shown(row["tax"]), *(_worst(row["worst"].get(f)) for f in fs)]
        for row in rules
    ]
    told = [f"{f} told {declared}" for f, declared in setting["misjudged"]]
    misjudged = [["rule", *told]]
    misjudged += [
        [row["rule"], *(_worst(row["misjudged"].get(pair)) for pair in told)]
        for row in rules
        if row["misjudged"]
    ]
    notes = [f"{row['rule']}: {row['note']}." for row in rules if row["note"]]
    return BLOCK_A.format(
        contributions=setting["contributions"],
        entries=setting["entries"],
        directions=setting["directions"],
        seeds=len(setting["seeds"]),
        table=markdown(rows),
        misjudged=markdown(misjudged),
        notes="\n".join(notes),
        cost=_cost(rules),
    )


def _worst(said: Mapping[str, Any] | None) -> str:
    return "n/a" if said is None else f"{heat.shown(said['kappa'])} {said['attack']}"


def _cost(rules: list[dict[str, Any]]) -> str:
    priced = [row for row in rules if "seconds" in row]
    if not priced:
        return "Not measured."
    rows = [["rule", "seconds", "peak MiB"]]
    rows += [
        [row["rule"], f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"] for row in priced
    ]
    said = (
        "20 contributions of 1,000,000 entries, 4 declared; processor seconds on one thread, and\n"
        "peak memory beside the contributions' own 76 MiB. Flower's include turning messages into\n"
        "arrays, which it cannot do without.\n\n"
    )
    return said + markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table: the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

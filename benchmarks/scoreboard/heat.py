"""Heat maps of a block's result: a PNG to look at, an HTML table to read every cell in."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure

MISSING = "#d5d9de"
INK = "#1c2733"


@dataclass(frozen=True)
class Heat:
    """One heat map: smaller is better.

    Attributes:
        title: What is drawn.
        figure: Which figure of an entry.
        low: Where the colours begin.
        high: Where they end.
        log: Whether they follow the logarithm.
        rows: Rules, in order.
        columns: (attack, f), in order.
        entries: By (rule, attack, f); one without the figure has ``na``.
    """

    title: str
    figure: str
    low: float
    high: float
    log: bool
    rows: Sequence[str]
    columns: Sequence[tuple[str, int]]
    entries: Mapping[tuple[str, str, int], Mapping[str, Any]]

    def value(self, row: str, column: tuple[str, int]) -> float | None:
        """A cell's figure; None where it cannot be."""
        entry = self.entries.get((row, *column), {"na": "not measured"})
        return None if "na" in entry else float(entry[self.figure])

    @property
    def scale(self) -> Normalize:
        """From figures to 0 … 1."""
        kind = LogNorm if self.log else Normalize
        return kind(self.low, self.high, clip=True)

    def colour(self, value: float | None) -> str:
        """As #rrggbb: green is good, red is bad, grey is what cannot be."""
        if value is None:
            return MISSING
        inside = min(max(value, self.low), self.high)
        return to_hex(mpl.colormaps["RdYlGn_r"](float(self.scale(inside))))


def readable_on(colour: str) -> str:
    """Ink or white, whichever stands out from a colour."""
    red, green, blue = to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def shown(value: float | None) -> str:
    """Two digits, or what stands for none."""
    if value is None:
        return "n/a"
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}" if value < 1000 else f"{value:.0e}"


def of(
    result: Mapping[str, Any], title: str, scale: tuple[float, float, bool], where: str = ""
) -> Heat:
    """The cells of a result in which the rule is told what is true.

    Args:
        result: A block's.
        title: What is drawn.
        scale: Where the colours begin and end, and whether they follow the logarithm.
        where: The condition, in a block that has several.
    """
    entries = {
        (entry["rule"], entry["attack"], entry["f"]): entry
        for entry in result["cells"]
        if entry["f"] == entry["declared"] and entry.get("where", "") == where
    }
    attacks = dict.fromkeys(attack for _, attack, _ in entries)
    columns = [
        (attack, f) for attack in attacks for f in sorted({f for _, a, f in entries if a == attack})
    ]
    rows = list(dict.fromkeys(rule for rule, _, _ in entries))
    return Heat(title, result["figure"], *scale, rows, columns, entries)


def draw(heat: Heat, path: Path) -> None:
    """The map as a picture."""
    values = np.array(
        [[heat.value(row, column) for column in heat.columns] for row in heat.rows], dtype=float
    )
    width, height = 3.4 + 0.42 * len(heat.columns), 1.5 + 0.26 * len(heat.rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    colours = mpl.colormaps["RdYlGn_r"].with_extremes(bad=MISSING)
    inside = np.ma.masked_invalid(np.clip(values, heat.low, heat.high))
    axes.imshow(inside, cmap=colours, norm=heat.scale, aspect="auto")
    for y, row in enumerate(heat.rows):
        for x, column in enumerate(heat.columns):
            value = heat.value(row, column)
            ink = readable_on(heat.colour(value))
            axes.text(x, y, shown(value), ha="center", va="center", fontsize=6, color=ink)
    axes.set_yticks(range(len(heat.rows)), heat.rows, fontsize=7)
    axes.set_xticks(range(len(heat.columns)), [str(f) for _, f in heat.columns], fontsize=7)
    top = axes.secondary_xaxis("top")
    spans: dict[str, list[int]] = {}
    for x, (attack, _) in enumerate(heat.columns):
        spans.setdefault(attack, []).append(x)
    top.set_xticks([sum(at) / len(at) for at in spans.values()], list(spans), fontsize=7)
    for at in spans.values():
        axes.axvline(max(at) + 0.5, color="white", linewidth=2)
    axes.set_xlabel("attackers f", fontsize=7)
    axes.tick_params(length=0)
    top.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.suptitle(heat.title, fontsize=9)
    figure.savefig(path, dpi=85, metadata={"Software": None})


def table(heat: Heat) -> str:
    """The map as an HTML table: the interval, or the reason, of every cell on pointing at it."""
    spans: dict[str, int] = {}
    for attack, _ in heat.columns:
        spans[attack] = spans.get(attack, 0) + 1
    first = "".join(
        f'<th colspan="{count}">{html.escape(attack)}</th>' for attack, count in spans.items()
    )
    second = "".join(f"<th>{f}</th>" for _, f in heat.columns)
    lines = [
        f"<table><caption>{html.escape(heat.title)}</caption>",
        f"<tr><th>attack</th>{first}</tr><tr><th>attackers</th>{second}</tr>",
    ]
    for row in heat.rows:
        cells = "".join(_cell(heat, row, column) for column in heat.columns)
        lines.append(f"<tr><th>{html.escape(row)}</th>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(heat: Heat, row: str, column: tuple[str, int]) -> str:
    value = heat.value(row, column)
    entry = heat.entries.get((row, *column), {"na": "not measured"})
    if value is None:
        said = entry["na"]
    else:
        error = entry["ci95"][heat.figure]
        said = f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
    said = f"{row}, {column[0]}, f = {column[1]}: {said}"
    colour = heat.colour(value)
    style = f"background:{colour};color:{readable_on(colour)}"
    return f'<td style="{style}" title="{html.escape(said)}">{shown(value)}</td>'


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Who withstands what</title>
<style>
body {{ font: 14px sans-serif; color: {ink}; margin: 2em }}
table {{ border-collapse: collapse; margin-bottom: 2em }}
caption {{ text-align: left; font-weight: bold; padding-bottom: .5em }}
td, th {{ padding: 2px 5px; text-align: right; font-size: 12px; font-weight: normal }}
</style>
<h1>Who withstands what</h1>
<p>Point at a cell for its 95 % interval, or for why it cannot be. What is measured stands in
<a href="scoreboard.md">scoreboard.md</a>.</p>
{tables}
</html>
"""


def write_html(heats: Sequence[Heat], path: Path) -> None:
    """All maps on one page: no script, nothing from outside."""
    path.write_text(PAGE.format(ink=INK, tables="\n".join(map(table, heats))))

"""The report's charts, each an SVG text. Colours read on white and in grey print."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

INK, QUIET, GRID = "#1c2733", "#5b6875", "#e3e8ed"
MERGED, ALONE, TOGETHER, PALE = "#0b6e99", "#c2571a", "#3c7d3c", "#b9c4ce"
LEVELS = {
    "base": ("zero-shot", "#8a949e", ":"),
    "local": ("local-only, own data", ALONE, "--"),
    "oracle": ("central oracle", TOGETHER, "-."),
}
MAX_PANELS = 12
"""Groups drawn; the table on the page holds all of them."""
NAME_CHARACTERS, TITLE_CHARACTERS = 24, 44
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "svg.fonttype": "none",
    "svg.hashsalt": "anabranch",
}


def accuracy_over_rounds(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    levels: Mapping[str, Mapping[str, float]],
) -> str:
    """Validation accuracy of each client by round, a panel per group, with reference lines.

    Args:
        curves: Points (round, accuracy) per group and client.
        levels: Accuracy of base, local and oracle per group; what was not run is left out.
    """
    with mpl.rc_context(STYLE):
        shown = dict(islice(curves.items(), MAX_PANELS))
        columns = min(len(shown), 2)
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(9, 2.6 * rows + 0.6), layout="constrained")
        panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
        legend: dict[str, Artist] = {}
        for panel, (group, clients) in zip(panels, shown.items(), strict=False):
            for key, value in levels.get(group, {}).items():
                label, colour, dash = LEVELS[key]
                legend[label] = panel.axhline(value, color=colour, linestyle=dash, linewidth=1.5)
            for points in clients.values():
                xs, ys = [point[0] for point in points], [point[1] for point in points]
                (line,) = panel.plot(xs, ys, color=MERGED, linewidth=2, marker="o", markersize=3.5)
                legend["merged, each client"] = line
            panel.set_title(_title(group, clients), loc="left", fontweight="bold", parse_math=False)
            panel.set_xlabel("round")
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in panels[len(shown) :]:
            panel.set_visible(False)
        if len(shown) < len(curves):
            figure.supxlabel(f"the first {len(shown)} of {len(curves)} groups", color=QUIET)
        figure.legend(
            list(legend.values()), list(legend), loc="outside upper left", ncols=4, frameon=False
        )
        return _svg(figure)


def _title(group: str, clients: Collection[str]) -> str:
    """A panel's group and its clients, by name where they are few and short."""
    names = ", ".join(clients)
    few = len(clients) <= 4 and len(names) <= TITLE_CHARACTERS
    count = f"{len(clients)} client{'s' if len(clients) > 1 else ''}"
    return f"{_short(group)}: {names if few else count}"


def _short(name: str) -> str:
    """A name in the space a chart has for it."""
    return name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…"


def bytes_per_round(rounds: Sequence[Mapping[str, Any]], dense_update: int) -> str:
    """Bytes up and down in each round beside what dense fp32 would cost (log scale).

    Args:
        rounds: The journal's ``round`` rows.
        dense_update: Bytes of one dense fp32 adapter.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        panel: Axes = figure.subplots()
        numbers = [row["round"] for row in rounds]
        series = (
            ("up, as sent", [row["bytes_up"] for row in rounds], MERGED),
            ("up, dense fp32", [row["admitted"] * dense_update for row in rounds], PALE),
            ("down, as sent", [row["bytes_down"] for row in rounds], ALONE),
        )
        width = 0.8 / len(series)
        for index, (label, values, colour) in enumerate(series):
            places = [number + (index - 1) * width for number in numbers]
            panel.bar(places, values, width=width * 0.9, color=colour, label=label)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(10))
        top = max(max(values) for _, values, _ in series)
        panel.set_ylim(top / 3000, 2 * top)
        panel.yaxis.set_major_formatter(EngFormatter("B"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("round")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="x", visible=False)
        panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.18))
        return _svg(figure)


def similarity(names: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    """Heat map of the cosine between the clients' task vectors."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        side = min(9.0, 2.2 + 0.42 * len(names))
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        panel: Axes = figure.subplots()
        picture = panel.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
        if len(names) <= 30:
            labels = [_short(name) for name in names]
            panel.set_xticks(range(len(names)), labels, rotation=45, ha="right", parse_math=False)
            panel.set_yticks(range(len(names)), labels, parse_math=False)
        else:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"{len(names)} clients, in the order of the table")
        for spine in panel.spines.values():
            spine.set_visible(False)
        if len(names) <= 12:
            for i, row in enumerate(cosines):
                for j, value in enumerate(row):
                    ink = "white" if abs(value) > 0.6 else INK
                    panel.text(
                        j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink
                    )
        figure.colorbar(picture, ax=panel, shrink=0.7, label="cosine")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser sets the text, in fonts that this machine may lack.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

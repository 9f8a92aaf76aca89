"""Put a run's summary and journal on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from anabranch.simulation.report import charts

if TYPE_CHECKING:
    from anabranch.simulation.summary import Measured


def write_report(summary: Mapping[str, Any], measured: Measured, path: Path) -> None:
    """Write ``report.html``: no script, no outside file, every chart inline.

    Args:
        summary: What ``summarise`` returned.
        measured: What the run left.
        path: File to write.
    """
    environment = Environment(
        loader=PackageLoader("anabranch.simulation", "report"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    environment.filters["percent"] = _percent
    environment.filters["kilo"] = _kilo
    names = {row["id"]: row["client"] for row in summary["clients"]}
    curves = _curves(summary, measured)
    latest = measured.store.latest()
    merged = latest.report if latest else {}
    heat = merged.get("cosine")
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        names=names,
        gated=[_looked_at(row) for row in summary["rounds"] if "gate" in row],
        defended=_most_suspicious(summary["defence"]),
        accuracy=Markup(charts.accuracy_over_rounds(curves, _levels(summary, measured)))
        if curves
        else None,
        traffic=Markup(charts.bytes_per_round(summary["rounds"], summary["update_bytes"]["fp32"]))
        if any(row["bytes_up"] for row in summary["rounds"])
        else None,
        similarity=Markup(
            charts.similarity([names.get(name, name) for name in merged["names"]], heat)
        )
        if heat
        else None,
        up=sum(row["bytes_up"] for row in summary["rounds"]),
        down=sum(row["bytes_down"] for row in summary["rounds"]),
        dense=sum(row["admitted"] for row in summary["rounds"]) * summary["update_bytes"]["fp32"],
    )
    path.write_text(page, encoding="utf-8")


GATE_FACTS = (
    "metric_before", "metric", "negative_flips", "positive_flips", "asr_before", "asr",
)  # fmt: skip


def _looked_at(row: Mapping[str, Any]) -> dict[str, Any]:
    """A gated round, with None for what its scorer did not look at."""
    return {**row, "gate": {**dict.fromkeys(GATE_FACTS), **row["gate"]}}


def _most_suspicious(defence: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The clients, the most suspicious first."""
    clients = [] if defence is None else defence["clients"]
    return sorted(clients, key=lambda row: (-(row["score"] or 0.0), row["id"]))


def _curves(
    summary: Mapping[str, Any], measured: Measured
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    rows = measured.store.notes("evaluate")
    for client in summary["clients"]:
        base = measured.accuracy("base", client["group"], "validation")
        points = [(0, base)] if base is not None else []
        points += [
            (row["round"], row["accuracy"])
            for row in rows
            if row["client"] == client["id"] and "accuracy" in row
        ]
        if len(points) > 1:
            curves.setdefault(client["group"], {})[client["client"]] = points
    return curves


def _levels(summary: Mapping[str, Any], measured: Measured) -> dict[str, dict[str, float]]:
    """Validation accuracy of what the curves are compared with, per group."""
    levels: dict[str, dict[str, float]] = {}
    for group in measured.scored:
        alone: Sequence[float | None] = [
            measured.accuracy(f"local-{index}", group, "validation")
            for index, other in enumerate(measured.groups)
            if other == group
        ]
        found = {
            "base": measured.accuracy("base", group, "validation"),
            "local": fmean(value for value in alone if value is not None)
            if all(value is not None for value in alone)
            else None,
            "oracle": measured.accuracy("oracle", group, "validation"),
        }
        levels[group] = {key: value for key, value in found.items() if value is not None}
    return levels


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _kilo(value: float | None) -> str:
    return "–" if value is None else f"{value / 1000:,.1f} kB"

"""``anabranch simulate``: a whole federation on this machine, and what it is compared with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.output import human_bytes, print_json, stderr, stdout


def simulate_command(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="Scenario file, TOML.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results; runs/NAME, by the scenario's name, when left out."
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Instead of the scenario's own: inprocess (this process, quick) or flower "
            "(Flower's Ray simulation, the deployed path)."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with this scenario's interrupted run in the folder; "
            "what is finished is read back.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Delete the earlier run in the folder first; refused if anything else lies there.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json, no table.")] = False,
) -> None:
    """Run a federation on this machine, and what it is compared with.

    The folder then holds the merged adapter (a PEFT folder), summary.json, report.html, the
    journal metrics.jsonl and config.toml, the scenario with every default spelled out.
    """
    from anabranch.aggregation.recipe import validation_line
    from anabranch.simulation.loading import collector_paused
    from anabranch.simulation.scenario import Scenario, load_scenario

    loaded = load_scenario(scenario)
    if engine is not None:
        from pydantic import ValidationError

        try:
            loaded = Scenario.model_validate({**loaded.model_dump(), "engine": engine})
        except ValidationError as error:
            raise ValueError(validation_line(error, "--engine")) from error
    folder = out or Path("runs") / loaded.name
    # Flower and transformers log much that a person who watches a bar does not need.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with stderr.status("loading the base and the data"), collector_paused():
        from anabranch.simulation.prepare import prepare

        try:
            prepare(loaded)
        except ValueError as error:
            raise ValueError(f"{scenario}: {error}") from error
    summary = _run(loaded, folder, resume=resume, overwrite=overwrite)
    if as_json:
        print_json(summary)
        return
    _show(summary, folder)


def _run(scenario: Any, folder: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    from anabranch.simulation.run import simulate

    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=stderr) as shown:

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = shown.add_task(phase, total=total)
            shown.update(bars[phase], completed=done, total=total)

        return simulate(scenario, folder, resume=resume, overwrite=overwrite, progress=progress)


COLUMNS = (
    ("base", "zero-shot"),
    ("local_only_own", "local-only\nown task"),
    ("local_only", "local-only\nall tasks"),
    ("fedavg", "FedAvg\ndense"),
    ("merged", "merged"),
    ("oracle", "central\noracle"),
)

ATTACKED = (
    ("base", "zero-shot"),
    ("fedavg", "FedAvg attacked"),
    ("undefended", "without the defence"),
    ("merged", "merged"),
    ("unattacked", "everybody honest"),
    ("oracle", "oracle"),
)
"""What an attack's success and its cost are told of."""


def _show(summary: dict[str, Any], folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{summary['name']}: test accuracy", title_justify="left")
    table.add_column("client", overflow="fold")
    for key, heading in COLUMNS:
        table.add_column(heading, justify="right", style="bold" if key == "merged" else None)
    for row in summary["clients"]:
        table.add_row(escape(row["client"]), *(_percent(row[key]) for key, _ in COLUMNS))
    table.add_section()
    for group, scores in summary["groups"].items():
        table.add_row(escape(f"task {group}"), *(_percent(scores.get(key)) for key, _ in COLUMNS))
    table.add_section()
    table.add_row("mean", *(_percent(summary["mean"][key]) for key, _ in COLUMNS), style="bold")
    stdout.print(table)
    size = summary["update_bytes"]
    if size["ours"]:
        stdout.print(
            f"update: {human_bytes(size['ours'])} a client and round, "
            f"{size['ratio']:.1f}x smaller than the fp16 adapter ({human_bytes(size['fp16'])}); "
            f"payload alone {size['payload_ratio']:.1f}x",
            soft_wrap=True,
        )
    mean = summary["mean"]
    if mean["oracle"]:
        stdout.print(f"merged reaches {mean['merged'] / mean['oracle']:.1%} of the oracle's mean")
    privacy = summary["privacy"]
    if privacy and privacy["seeded"]:
        stdout.print("[yellow]privacy: the noise was drawn from a seed; nothing is promised[/]")
    elif privacy:
        stdout.print(
            f"privacy: the adapters keep to an epsilon of {privacy['epsilon']:.3g} of "
            f"{privacy['budget']:g} at a delta of {privacy['delta']:g} for each client, whose "
            f"update is clipped to {privacy['clip']:g}; rounds left: {privacy['rounds_left']}",
            soft_wrap=True,
        )
    if privacy and privacy["stopped"]:
        stdout.print(f"[yellow]stopped early: {privacy['stopped']}[/]")
    if summary["attack"]:
        _show_attack(summary)
    refused = len(summary["refused"])
    if refused:
        stdout.print(f"[yellow]{refused} updates were not admitted; the report says why[/]")
    stdout.print(
        f"{summary['seconds']:.0f} s; results in [bold]{escape(str(folder))}[/], "
        "open report.html there"
    )


def _show_attack(summary: dict[str, Any]) -> None:
    mean = summary["mean"]
    for band in summary["attack"]["bands"]:
        why = ", ".join(f"{code} {count}" for code, count in band["reasons"].items())
        stdout.print(
            f"attack: {band['kind']} by {', '.join(band['ids'])} from round {band['from_round']}: "
            f"{band['admitted']} updates admitted, {band['refused']} refused"
            + (f" ({why})" if why else ""),
            soft_wrap=True,
            highlight=False,
        )
        if band["success"]["merged"] is not None:
            shown = ", ".join(
                f"{heading} {_percent(band['success'][key])}"
                for key, heading in ATTACKED
                if band["success"][key] is not None
            )
            stdout.print(f"  success in percent: {shown}", soft_wrap=True, highlight=False)
    shown = ", ".join(
        f"{heading} {_percent(mean[key])}" for key, heading in ATTACKED if mean[key] is not None
    )
    stdout.print(f"  accuracy in percent: {shown}", soft_wrap=True, highlight=False)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"

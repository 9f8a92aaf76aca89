"""``anabranch doctor``: what a coordinator would stumble over, before it starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import print_json, stdout


def doctor_command(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    port: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Is it free? The SuperLink's, the API's, the dashboard's; repeatable.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Look at a federation's configuration and keys, and at what it will run on.

    That is its start adapter, key files, database, store, clocks, recipe, disk, memory and ports.

    Ends with 1 if something would stop a coordinator.
    """
    from rich.markup import escape

    from anabranch.coordinator.doctor import examine_federation

    found = examine_federation(folder, [_address(one) for one in port or ()])
    if json:
        print_json([asdict(one) for one in found])
    else:
        for one in found:
            mark = "[green]ok  [/]" if one.ok else "[bold red]fail[/]"
            stdout.print(f"{mark} {one.check}: {escape(one.told)}", soft_wrap=True)
    if not all(one.ok for one in found):
        raise typer.Exit(1)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"--port {text[:60]!r}: give PORT or HOST:PORT, of 1 to 65535")
    return host.strip("[]") or "127.0.0.1", int(port)

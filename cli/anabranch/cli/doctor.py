"""``anabranch doctor``: what a coordinator would stumble over, before it starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import print_json, stdout


def doctor_command(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """Look at a federation's configuration, start adapter, keys, store, recipe, disk and memory.

    Ends with 1 if something would stop a coordinator.
    """
    from rich.markup import escape

    from anabranch.coordinator.doctor import examine_federation

    found = examine_federation(folder)
    if json:
        print_json([asdict(one) for one in found])
    else:
        for one in found:
            mark = "[green]ok  [/]" if one.ok else "[bold red]fail[/]"
            stdout.print(f"{mark} {one.check}: {escape(one.told)}", soft_wrap=True)
    if not all(one.ok for one in found):
        raise typer.Exit(1)

"""``anabranch methods``: the merge methods and their parameters."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from anabranch.cli.output import print_json, stdout


def methods_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merge methods with their parameters."""
    from anabranch.aggregation.registry import methods

    rows: list[dict[str, Any]] = []
    for name, method in sorted(methods().items()):
        schema = method.config.model_json_schema()
        parameters: dict[str, Any] = {
            key: {
                "default": field.get("default"),
                "about": " ".join(field.get("description", "").split()),
            }
            for key, field in schema.get("properties", {}).items()
        }
        rows.append(
            {
                "name": name,
                "scope": method.scope,
                "linear": method.coefficients is not None,
                "about": _about(method.merge or method.coefficients or method.matrices),
                "parameters": parameters,
            }
        )
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("method", "scope", "parameters"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        shown = "\n".join(
            f"{key} = {value['default']}  [dim]{value['about']}[/]"
            for key, value in row["parameters"].items()
        )
        table.add_row(f"[bold]{row['name']}[/]", row["scope"], f"{row['about']}\n{shown}".strip())
        table.add_row()
    stdout.print(table)


def _about(rule: Any) -> str:
    """What a method is: the first line of its file, or of the function where that says nothing."""
    module = inspect.getmodule(rule)
    text = (module and module.__doc__) or inspect.getdoc(rule) or ""
    return text.strip().partition("\n")[0]

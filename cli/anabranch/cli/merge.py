"""``anabranch merge``: merge PEFT adapter folders offline."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import print_json, stderr, stdout


def merge_command(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Recipe file, TOML or YAML: how to merge.")
    ],
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT adapter folders.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")],
    start: Annotated[
        Path | None,
        typer.Option(help="Adapter all of them started from; needed where heads were trained."),
    ] = None,
    budget_mb: Annotated[
        int, typer.Option(min=16, help="Working memory of the merge, in MB (10^6 bytes).")
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge PEFT adapters into one that `PeftModel.from_pretrained` loads."""
    from rich.markup import escape

    from anabranch.aggregation import load_recipe, merge, resolve

    loaded = load_recipe(recipe)
    method, _ = resolve(loaded, str(recipe))
    if out.exists():
        raise ValueError(f"{out}: already exists; name a new folder with --out")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{out}: cannot be written, {above} is no folder one may write to")
    from anabranch.vectors.peft_folder import read_adapter, write_adapter

    names = [str(folder) for folder in adapters]
    with stderr.status(f"reading {len(adapters)} adapters") as status:
        contributions = [read_adapter(folder) for folder in adapters]
        begun = None if start is None else read_adapter(start)
        for name, adapter in zip(names, contributions, strict=True):
            if adapter.dense and begun is None:
                trained = ", ".join(sorted(adapter.dense))
                raise ValueError(
                    f"{name}: holds weights trained in full ({trained}); "
                    "name the adapter they started from with --start"
                )
        status.update(f"merging {len(adapters)} adapters by {method.name}")
        try:
            result = merge(
                contributions,
                loaded,
                start=begun,
                names=names,
                budget_bytes=budget_mb * 1_000_000,
            )
        except ValueError as error:
            # What is wrong with an adapter names it; the rest the recipe asked for.
            if any(name in str(error) for name in names):
                raise
            raise ValueError(f"{recipe}: {error}") from error
        status.update("writing")
        write_adapter(result.adapter, out)
    report = asdict(result.report)
    if as_json:
        print_json({"out": str(out), "method": method.name, "report": report})
        return
    ranks = sorted({factors.rank for factors in result.adapter.lora.values()})
    stdout.print(
        f"[bold]{escape(str(out))}[/]: {len(adapters)} adapters by {method.name}, "
        f"{len(result.adapter.lora)} modules, rank {'/'.join(map(str, ranks))}, "
        f"truncation error {result.report.overall_truncation:.2%}",
        soft_wrap=True,
    )

"""``anabranch merge``: merge PEFT adapter folders, or checkpoints, offline."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.output import caution, human_bytes, module_bar, print_json, stderr, stdout
from anabranch.cli.plan import show_plan
from anabranch.cli.ranks import LOST, run_ranks

if TYPE_CHECKING:
    from anabranch.aggregation.ranks import Ranks


@dataclass(frozen=True)
class _Job:
    """What is asked for, by the recipe file and the arguments."""

    source: Path
    recipe: Any
    inputs: tuple[Path, ...]
    base: Path | None
    start: Path | None
    dtype: Any
    without: tuple[str, ...]
    budget_bytes: int
    device: str | None
    warnings: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [str(path) for path in self.inputs]

    def blamed(self, error: ValueError) -> ValueError:
        """The error with a place on it: what is wrong with an input names it, the rest does not."""
        places = [*self.names, str(self.source), *(str(p) for p in (self.base, self.start) if p)]
        if any(place in str(error) for place in places):
            return error
        return ValueError(f"{self.source}: {str(error).removeprefix('recipe: ')}")


def merge_command(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe, TOML or YAML: how to merge. mergekit's YAML names its models itself.",
        ),
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[INPUT...]", help="PEFT adapter folders, or checkpoints; not both at once."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; must not exist.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Checkpoint that checkpoints were fine-tuned from.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Adapter that adapters started from; needed where heads were trained."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Leave an input out, by folder name or path, as if it had never been there. "
            "Repeatable.",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Check the inputs and say what would be done; merge not.")
    ] = False,
    budget_mb: Annotated[
        int, typer.Option(min=16, help="Working memory of the merge, in MB (10^6 bytes).")
    ] = 2000,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where methods that decide entry by entry do so: cpu, cuda or cuda:N.",
            show_default="cpu",
        ),
    ] = None,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="Largest file of a merged checkpoint, in MB.")
    ] = 5000,
    ranks: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that merge together, each a part of the modules and the memory."
        ),
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan or the report as JSON.")
    ] = False,
) -> None:
    """Merge PEFT adapters into one that `PeftModel.from_pretrained` loads, or whole models.

    Headers and configurations are checked before any weight is read.
    """
    from anabranch.aggregation import plan_merge
    from anabranch.aggregation.engine.device import existing_device
    from anabranch.aggregation.engine.shard import joined, ranks_of, started_together
    from anabranch.aggregation.ranks import LostRankError

    mine = ranks_of(os.environ)
    if ranks > 1 and mine.count > 1 and ranks != mine.count:
        raise ValueError(f"--ranks: is {ranks}, and {mine.count} were started; leave it out")
    if device is not None:
        existing_device(device)
    job = _read(recipe, tuple(inputs or ()), base, start, tuple(without or ()), budget_mb, device)
    if not plan:
        _check_out(out)
    try:
        planned = plan_merge(
            job.inputs,
            job.recipe,
            base=job.base,
            start=job.start,
            without=job.without,
            dtype=job.dtype,
            budget_bytes=job.budget_bytes,
            ranks=max(ranks, mine.count),
        )
    except ValueError as error:
        raise job.blamed(error) from error
    if ranks > mine.count and not plan:
        assert out is not None
        raise typer.Exit(run_ranks(ranks, out))
    warnings = [*job.warnings, *planned.warnings]
    for warning in warnings if mine.rank == 0 else ():
        caution(warning)
    if plan:
        show_plan(planned, as_json, warnings)
        return
    assert out is not None
    try:
        with joined(mine):
            if planned.kind == "checkpoints":
                report, line = _merge_checkpoints(job, out, shard_mb * 1_000_000, mine)
            else:
                report, line = _merge_adapters(job, out, mine)
    except ValueError as error:
        raise job.blamed(error) from error
    except LostRankError as error:
        if started_together(os.environ):
            raise typer.Exit(LOST) from error
        raise
    if mine.rank == 0:
        _report(job, out, as_json, report, line)


def _read(
    source: Path,
    inputs: tuple[Path, ...],
    base: Path | None,
    start: Path | None,
    without: tuple[str, ...],
    budget_mb: int,
    device: str | None,
) -> _Job:
    from anabranch.aggregation.mergekit import from_mergekit, is_mergekit
    from anabranch.aggregation.recipe import load_recipe, read_config

    budget_bytes = budget_mb * 1_000_000
    data = read_config(source)
    if not is_mergekit(data):
        recipe = load_recipe(source)
        from anabranch.aggregation.registry import named

        named(recipe, str(source))
        return _Job(source, recipe, inputs, base, start, None, without, budget_bytes, device, ())
    if inputs or base is not None or start is not None:
        raise ValueError(f"{source}: names its models itself; leave the arguments and --base out")
    theirs = from_mergekit(data, str(source))
    return _Job(
        source,
        theirs.recipe,
        theirs.models,
        theirs.base,
        None,
        theirs.dtype,
        without,
        budget_bytes,
        device,
        theirs.warnings,
    )


def _check_out(out: Path | None) -> None:
    if out is None:
        raise ValueError("nowhere to write to; name a new folder with --out, or ask for --plan")
    if out.exists():
        raise ValueError(f"{out}: already exists; name a new folder with --out")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{out}: cannot be written, {above} is no folder one may write to")


def _merge_adapters(job: _Job, out: Path, ranks: Ranks) -> tuple[dict[str, Any], str]:
    from anabranch.aggregation import merge
    from anabranch.aggregation.registry import named
    from anabranch.aggregation.withdrawal import remaining
    from anabranch.vectors.fisher_file import read_fisher
    from anabranch.vectors.peft_folder import read_adapter, write_adapter

    stay = remaining(job.names, job.without, job.recipe)
    with stderr.status(f"reading {len(stay.names)} adapters"):
        contributions = [read_adapter(job.inputs[index]) for index in stay.indices]
        if named(job.recipe).needs_importance:
            contributions = [
                replace(adapter, importance=read_fisher(job.inputs[index]))
                for adapter, index in zip(contributions, stay.indices, strict=True)
            ]
        begun = None if job.start is None else read_adapter(job.start)
    with module_bar(job.recipe.method, shown=ranks.rank == 0) as progress:
        result = merge(
            contributions,
            stay.recipe,
            start=begun,
            names=stay.names,
            budget_bytes=job.budget_bytes,
            device=job.device,
            progress=progress,
            ranks=ranks,
        )
    if ranks.rank == 0:
        write_adapter(result.adapter, out)
    inner = sorted({factors.rank for factors in result.adapter.lora.values()})
    return asdict(result.report), (
        f"{len(contributions)} adapters by {job.recipe.method}, "
        f"{len(result.adapter.lora)} modules, rank {'/'.join(map(str, inner))}, "
        f"truncation error {result.report.overall_truncation:.2%}{_stood_out(result.report)}"
    )


def _stood_out(report: Any) -> str:
    """Who was suspected, by what first, and what was done; nothing where nobody looked."""
    if report.suspicion is None:
        return ""
    first: dict[str, Any] = {}
    for finding in report.suspicion["findings"]:
        first.setdefault(finding["client"], finding)
    said = [f"{name} ({one['action']}): {one['why']}" for name, one in first.items()]
    return "".join(f"\nstood out: {line}" for line in said) or "\nnobody stood out"


def _merge_checkpoints(
    job: _Job, out: Path, shard_bytes: int, ranks: Ranks
) -> tuple[dict[str, Any], str]:
    from anabranch.aggregation import merge_checkpoints

    with module_bar(job.recipe.method, shown=ranks.rank == 0) as progress:
        report = merge_checkpoints(
            job.inputs,
            job.recipe,
            out,
            base=job.base,
            without=job.without,
            dtype=job.dtype,
            budget_bytes=job.budget_bytes,
            device=job.device,
            shard_bytes=shard_bytes,
            progress=progress,
            ranks=ranks,
        )
    return asdict(report), (
        f"{len(report.names)} checkpoints by {job.recipe.method}, {report.merged} tensors merged, "
        f"{report.copied} copied, {human_bytes(report.size_bytes)}"
    )


def _report(job: _Job, out: Path, as_json: bool, report: dict[str, Any], line: str) -> None:
    from rich.markup import escape

    if as_json:
        print_json({"out": str(out), "method": job.recipe.method, "report": report})
        return
    stdout.print(f"[bold]{escape(str(out))}[/]: {line}", soft_wrap=True)

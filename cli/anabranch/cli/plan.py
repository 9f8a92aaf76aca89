"""What ``anabranch merge --plan`` prints: what a merge would read, hold and write."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anabranch.cli.output import human_bytes, print_json, stdout


def show_plan(plan: Any, as_json: bool, warnings: list[str]) -> None:
    """Print a plan.

    Args:
        plan: The planned merge.
        as_json: Every field, for programs.
        warnings: What was found odd about the inputs; people have been told already.
    """
    from rich.markup import escape

    facts = {**asdict(plan), "warnings": warnings}
    if as_json:
        print_json(facts)
        return
    copied = f", {plan.copied} copied" if plan.copied else ""
    lines = {
        "merge": f"{len(plan.names)} {plan.kind} by {plan.method}, scope {plan.scope}",
        "of": ", ".join(plan.names),
        "modules": f"{plan.modules} merged{copied}",
        "passes": f"{plan.passes} at most over the entries",
        "memory": f"{human_bytes(plan.memory_bytes)} at most, above what torch takes",
        "reads": f"{human_bytes(plan.read_bytes)} at most",
        "writes": human_bytes(plan.output_bytes),
    }
    for key, value in lines.items():
        stdout.print(f"[dim]{key:>8}[/]  {escape(value)}", soft_wrap=True)
    for number, rank in enumerate(plan.ranks if len(plan.ranks) > 1 else ()):
        stdout.print(f"[dim]{f'rank {number}':>8}[/]  {_rank_line(rank)}", soft_wrap=True)
    for group in plan.groups if len(plan.groups) > 1 else ():
        stdout.print(f"[dim]{'group':>8}[/]  {escape(_group_line(group))}", soft_wrap=True)


def _rank_line(rank: Any) -> str:
    """What one of several processes does."""
    return (
        f"{rank.modules} modules, {human_bytes(rank.memory_bytes)} of memory, "
        f"reads {human_bytes(rank.read_bytes)}, writes {human_bytes(rank.output_bytes)}"
    )


def _group_line(group: Any) -> str:
    """Modules that are merged alike, and how."""
    which = f"{group.modules} like {group.first}: "
    if group.excluded:
        return which + "left as they are"
    settings = {"weights": list(group.weights), "scale": group.scale, **group.params}
    return which + ", ".join(f"{key} {value}" for key, value in settings.items())

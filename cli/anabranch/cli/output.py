"""How every command speaks: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

stdout = Console(highlight=False, emoji=False)
stderr = Console(stderr=True, highlight=False, emoji=False)


def complain(message: str) -> None:
    """One line on stderr."""
    line = " ".join(message.split()) or "failed without a message; ANABRANCH_DEBUG=1 shows where"
    stderr.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)


def caution(message: str) -> None:
    """One line on stderr about what is odd and goes on."""
    stderr.print(f"[bold yellow]warning:[/] {escape(' '.join(message.split()))}", soft_wrap=True)


@contextmanager
def module_bar(title: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar of modules done, on a terminal; what it yields is told done and total."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=stderr, transient=True, disable=not (shown and stderr.is_terminal)
    ) as bar:
        task = bar.add_task(escape(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """A value as JSON on stdout, for other programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def human_bytes(count: float) -> str:
    """A number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError

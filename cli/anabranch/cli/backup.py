"""``anabranch backup`` and ``restore``: a federation's rounds, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.output import human_bytes, stdout

if TYPE_CHECKING:
    from anabranch.coordinator.store.backup import Backup


def backup_command(
    federation: Annotated[Path, typer.Argument(help="The federation's folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, a tar.")],
) -> None:
    """Write a federation's rounds, updates and adapters to one file.

    The coordinator may go on meanwhile: the backup is of one moment. Its own key is not in it: keep
    a copy of keys/coordinator.key apart.
    """
    from anabranch.coordinator.store.backup import backup

    _say(out, backup(federation, out))


def restore_command(
    file: Annotated[Path, typer.Argument(help="What anabranch backup wrote.")],
    folder: Annotated[Path, typer.Argument(help="The federation's folder, a new one.")],
    store: Annotated[
        str | None, typer.Option(help="Database to restore into; as it was by default.")
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="Folder or s3://BUCKET/PREFIX of the artifacts; as it was by default."),
    ] = None,
) -> None:
    """Make a federation's folder and store from a backup, in another database if asked."""
    from anabranch.coordinator.store.backup import restore

    _say(folder, restore(file, folder, url=store, artifacts_place=artifacts))


def _say(place: Path, done: Backup) -> None:
    counts = ", ".join(f"{count} {table}" for table, count in done.rows.items())
    stdout.print(
        f"{place}  {done.federation}, run {done.run}: {counts}, {done.artifacts} artifacts of "
        f"{human_bytes(done.size_bytes)}",
        soft_wrap=True,
        markup=False,
    )

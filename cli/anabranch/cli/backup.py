"""``anabranch backup`` and ``restore``: a federation's rounds, or an API's state, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anabranch.cli.output import human_bytes, stdout

if TYPE_CHECKING:
    from anabranch.coordinator.api.backup import StateBackup
    from anabranch.coordinator.store.backup import Backup


def backup_command(
    federation: Annotated[
        Path, typer.Argument(help="The federation's folder; or api.toml, for the API's own state.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write, a tar.")],
) -> None:
    """Write a federation's rounds, updates and adapters to one file.

    The coordinator may go on meanwhile: the backup is of one moment. Its own key is not in it: keep
    a copy of keys/coordinator.key apart. Of api.toml it holds the API's authority with its key, who
    is enrolled, and the audit log: only its owner may read that file, and it is to be kept so.
    """
    from anabranch.coordinator.api.backup import backup_state
    from anabranch.coordinator.api.config import load_api
    from anabranch.coordinator.store.backup import backup

    if federation.is_file():
        _say_state(out, backup_state(load_api(federation).state, out))
        return
    _say(out, backup(federation, out))


def restore_command(
    file: Annotated[Path, typer.Argument(help="What anabranch backup wrote.")],
    folder: Annotated[
        Path, typer.Argument(help="The federation's folder, or the API's `state`: a new one.")
    ],
    store: Annotated[
        str | None, typer.Option(help="Database to restore into; as it was by default.")
    ] = None,
    artifacts: Annotated[
        str | None,
        typer.Option(help="Folder or s3://BUCKET/PREFIX of the artifacts; as it was by default."),
    ] = None,
) -> None:
    """Make a federation's folder and store from a backup, in another database if asked.

    From a backup of an API it makes the folder of its state.
    """
    from anabranch.coordinator.api.backup import holds_state, restore_state
    from anabranch.coordinator.store.backup import restore

    if holds_state(file):
        if store is not None or artifacts is not None:
            raise ValueError(f"{file}: is of an API's state, which has no store and no artifacts")
        _say_state(folder, restore_state(file, folder))
        return
    _say(folder, restore(file, folder, url=store, artifacts_place=artifacts))


def _say(place: Path, done: Backup) -> None:
    counts = ", ".join(f"{count} {table}" for table, count in done.rows.items())
    stdout.print(
        f"{place}  {done.federation}, run {done.run}: {counts}, {done.artifacts} artifacts of "
        f"{human_bytes(done.size_bytes)}",
        soft_wrap=True,
        markup=False,
    )


def _say_state(place: Path, done: StateBackup) -> None:
    stdout.print(
        f"{place}  the API's authority, {done.certificates} certificates, {done.entries} audit "
        f"entries, the last of hash {done.last_hash or 'none'}", soft_wrap=True, markup=False,
    )  # fmt: skip

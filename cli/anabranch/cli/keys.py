"""``anabranch keys``: the keys by which parties of a federation know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import stdout

keys_app = typer.Typer(
    name="keys", help="Make the keys that sign updates, plans and adapters.", no_args_is_help=True
)


@keys_app.callback()
def _root() -> None:
    """Keys that sign updates, plans and adapters."""


@keys_app.command("new")
def new_command(
    name: Annotated[str, typer.Argument(help="Whose key: the client's name, or coordinator.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.key and NAME.pub.")] = Path(),
) -> None:
    """Make an Ed25519 key: NAME.key, which only you may read, and NAME.pub, which others get."""
    from anabranch.wire.keys import new_key, write_key

    key = new_key(name)
    private, public = write_key(key, out)
    stdout.print(
        f"{private}  keep this one here: whoever reads it can sign as {name}", soft_wrap=True
    )
    stdout.print(f"{public}  give this one away; its id is {key.public.id.hex()}", soft_wrap=True)

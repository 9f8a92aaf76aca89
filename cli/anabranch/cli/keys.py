"""``anabranch keys``: the keys by which parties of a federation know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import print_json, stdout

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


Federation = Annotated[
    Path, typer.Argument(metavar="FEDERATION", help="The federation's folder, at the coordinator.")
]


@keys_app.command("enrol")
def enrol_command(
    federation: Federation,
    public: Annotated[list[Path], typer.Argument(metavar="PUB...", help="Clients' .pub files.")],
) -> None:
    """Let clients' keys sign updates; a client may have several while one replaces another."""
    from anabranch.coordinator.registry import enrol
    from anabranch.wire.keys import read_public

    keys = [key for path in public for key in read_public(path)]
    enrol(_existing(federation), keys)
    for key in keys:
        stdout.print(f"enrolled {key.id.hex()} of {key.name}", soft_wrap=True)


@keys_app.command("revoke")
def revoke_command(
    federation: Federation,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as list shows it.")],
) -> None:
    """Refuse what a key signs, from the next update on."""
    from anabranch.coordinator.registry import revoke

    key = revoke(_existing(federation), key_id)
    stdout.print(f"revoked {key.id.hex()} of {key.name}", soft_wrap=True)


@keys_app.command("list")
def list_command(
    federation: Federation,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which keys are enrolled and which of them are revoked."""
    from anabranch.coordinator.registry import client_keys

    ring = client_keys(_existing(federation))
    rows = [
        {
            "id": key.id.hex(),
            "client": key.name,
            "state": "revoked" if key.id in ring.revoked else "enrolled",
        }
        for key in sorted(ring.enrolled.values(), key=lambda key: (key.name, key.id))
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        stdout.print(f"{row['id']}  {row['state']:<8}  {row['client']}", soft_wrap=True)


@keys_app.command("verify")
def verify_command(
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder that a federation published.")],
    public: Annotated[Path, typer.Argument(metavar="PUB", help="The coordinator's .pub file.")],
) -> None:
    """Check that a coordinator signed exactly this adapter, and say of what it is."""
    from anabranch.coordinator.published import check_folder
    from anabranch.wire.keys import by_id, read_public
    from anabranch.wire.signing import KeyRing

    statement = check_folder(adapter, KeyRing(by_id(read_public(public))))
    for key, value in statement.items():
        stdout.print(f"{key.replace('_', ' '):>12}  {value}", soft_wrap=True, markup=False)


def _existing(federation: Path) -> Path:
    if not federation.is_dir():
        raise ValueError(f"{federation}: there is no such folder; name the federation's own")
    return federation

"""``anabranch adapters``: what a federation has published, tags, exports, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.output import print_json, stdout
from anabranch.cli.verify import Federation, Json, opened

if TYPE_CHECKING:
    from anabranch.coordinator.federation import FederationConfig
    from anabranch.coordinator.store import Store
    from anabranch.vectors import Adapter
    from anabranch.wire.keys import PrivateKey

adapters_app = typer.Typer(
    name="adapters", help="List, tag, export, push, roll back and withdraw what was published.",
    no_args_is_help=True,
)  # fmt: skip

Which = Annotated[
    str, typer.Argument(help="A round, a tag, latest, or the beginning of an adapter's hash.")
]


@adapters_app.callback()
def _root() -> None:
    """List, tag, export, push, roll back and withdraw what was published."""


@adapters_app.command("list")
def list_command(federation: Federation, as_json: Json = False) -> None:
    """List every published adapter, oldest first; * is in service."""
    from anabranch.coordinator.lineage import published
    from anabranch.wire.receipt import receipt_hash

    with opened(federation) as (_, store):
        rows = published(store)
    if as_json:
        print_json(
            [
                {
                    "round": row.publication.round,
                    "kind": row.kind,
                    "adapter_hash": row.publication.adapter_hash,
                    "artifact": row.publication.digest,
                    "receipt": None if row.receipt is None else receipt_hash(row.receipt),
                    "tags": list(row.tags),
                    "in_service": row.in_service,
                }
                for row in rows
            ]
        )
        return
    for row in rows:
        read = row.read
        clients = f"{len(read.inputs)} clients" if read and read.inputs else ""
        stdout.print(
            f"{'*' if row.in_service else ' '} {row.publication.round:>4}  {row.kind or '':<10}  "
            f"{row.publication.adapter_hash[:16]}  {clients:<12}  {' '.join(row.tags)}".rstrip(),
            soft_wrap=True, markup=False,
        )  # fmt: skip


@adapters_app.command("export")
def export_command(
    federation: Federation,
    which: Which,
    out: Annotated[Path, typer.Option("-o", "--out", help="The PEFT folder to write, a new one.")],
) -> None:
    """Write an adapter as a PEFT folder, with its model card and its receipt."""
    from anabranch.coordinator.lineage import chosen, dress, published, read_published
    from anabranch.vectors.new_folder import new_folder
    from anabranch.vectors.peft_folder import write_adapter

    with opened(federation) as (config, store):
        row = chosen(published(store), which)
        adapter = read_published(store, config, _template(federation), row.publication)
    with new_folder(out) as partial:
        write_adapter(adapter, partial)
        dress(partial, adapter, config, row, _key(federation, config, needed=False))
    stdout.print(
        f"{out}  the adapter of round {row.publication.round}, {row.publication.adapter_hash}",
        soft_wrap=True, markup=False,
    )  # fmt: skip


@adapters_app.command("push")
def push_command(
    federation: Federation,
    which: Which,
    target: Annotated[
        str, typer.Argument(help="oci:FOLDER[:TAG], an OCI image layout; hub:FOLDER, a repository.")
    ],
) -> None:
    """Put an adapter, its card and its receipt into a local OCI image layout or Hub repository.

    What is there of an earlier adapter is replaced, under the same tag or in the same repository.
    """
    from tempfile import TemporaryDirectory

    from anabranch.coordinator.lineage import chosen, dress, published, read_published
    from anabranch.coordinator.pushing import hub, oci
    from anabranch.coordinator.pushing.target import labels, read_target
    from anabranch.vectors.peft_folder import write_adapter

    place = read_target(target)
    with opened(federation) as (config, store):
        row = chosen(published(store), which)
        adapter = read_published(store, config, _template(federation), row.publication)
    with TemporaryDirectory() as name:
        files = Path(name) / "adapter"
        write_adapter(adapter, files)
        dress(files, adapter, config, row, _key(federation, config, needed=False))
        told = f"the adapter of round {row.publication.round}"
        if place.kind == "oci":
            tag = place.tag or (which if which in row.tags else f"round-{row.publication.round}")
            told += f" as {tag}, {oci.push(files, place.folder, tag, labels(config, row))}"
        else:
            hub.push(files, place.folder)
    stdout.print(f"{place.folder}  {told}", soft_wrap=True, markup=False)


@adapters_app.command("pull")
def pull_command(
    source: Annotated[str, typer.Argument(help="oci:FOLDER:TAG, an OCI image layout.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The PEFT folder to write, a new one.")],
) -> None:
    """Write what was pushed into an OCI image layout as a PEFT folder, every byte checked."""
    from anabranch.coordinator.pushing import oci
    from anabranch.coordinator.pushing.target import read_target
    from anabranch.vectors.new_folder import new_folder

    place = read_target(source)
    if place.kind != "oci" or place.tag is None:
        raise ValueError(f"{source[:100]!r}: give oci:FOLDER:TAG; a Hub folder is read as it is")
    with new_folder(out) as partial:
        manifest = oci.pull(place.folder, place.tag, partial)
    about = manifest.get("annotations") or {}
    stdout.print(f"{out}  {about.get(oci.TITLE, place.tag)}", soft_wrap=True, markup=False)


@adapters_app.command("tag")
def tag_command(
    federation: Federation,
    name: Annotated[str, typer.Argument(help="The tag, such as champion.")],
    which: Annotated[
        str, typer.Argument(help="A round, another tag, latest, or the beginning of a hash.")
    ] = "latest",
    remove: Annotated[bool, typer.Option("--remove", help="Take the tag away.")] = False,
) -> None:
    """Let a name stand for an adapter, which retention keeps as long as it does."""
    from anabranch.coordinator.lineage import checked_tag, chosen, published

    with opened(federation) as (_, store):
        if remove:
            if name not in store.tags():
                raise ValueError(f"{name[:80]!r} is no tag; `anabranch adapters list` shows them")
            store.tag(name, None)
            stdout.print(f"{name} is gone", soft_wrap=True, markup=False)
            return
        row = chosen(published(store), which).publication
        store.tag(checked_tag(name), row.round)
    stdout.print(
        f"{name} stands for round {row.round}, {row.adapter_hash}", soft_wrap=True, markup=False
    )


@adapters_app.command("rollback")
def rollback_command(
    federation: Federation,
    which: Which,
    reason: Annotated[str, typer.Option(help="Why, for the receipt.")] = "",
) -> None:
    """Put an earlier adapter in service again; the next round starts from it.

    It takes the number of the next round. A coordinator that is collecting that round lets it go.
    """
    from anabranch.coordinator.lineage import chosen, published, roll_back

    if len(reason) > 1000:
        raise ValueError(f"--reason: {len(reason)} characters, at most 1000 go into a receipt")
    template = _template(federation)
    with opened(federation) as (config, store):
        key = _key(federation, config, needed=True)
        row = chosen(published(store), which)
        done = roll_back(store, config, template, row, reason, key)
        _serve(federation, config, store, template, key)
    stdout.print(
        f"round {done.round} puts the adapter of round {row.publication.round} in service again, "
        f"{done.adapter_hash}",
        soft_wrap=True, markup=False,
    )  # fmt: skip


@adapters_app.command("withdraw")
def withdraw_command(
    federation: Federation,
    clients: Annotated[list[str], typer.Argument(metavar="CLIENT...", help="Names of clients.")],
) -> None:
    """Do every merge again without some clients' updates, and put the last one in service.

    Like a rollback it takes the number of the next round. What others trained on top of adapters
    that held those updates is not undone, and the receipts say so. To keep a client out from now
    on, revoke its keys.
    """
    from anabranch.coordinator.withdrawing import withdraw

    template = _template(federation)
    with opened(federation) as (config, store):
        key = _key(federation, config, needed=True)
        done, rounds = withdraw(store, config, template, clients, key)
        _serve(federation, config, store, template, key)
    stdout.print(
        f"round {done.round}: {len(rounds)} merges done again, from round {rounds[0]} on, without "
        f"{', '.join(clients)}; in service is {done.adapter_hash}",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _serve(
    federation: Path,
    config: FederationConfig,
    store: Store,
    template: Adapter,
    key: PrivateKey | None,
) -> None:
    """Write what is in service into the folder that a finished run left it in."""
    from anabranch.coordinator.app import ADAPTER_FOLDER, publish
    from anabranch.coordinator.lineage import dress, published, read_published

    if not (federation / ADAPTER_FOLDER).exists():
        return
    latest = published(store)[-1]
    adapter = read_published(store, config, template, latest.publication)
    publish(
        adapter,
        federation / ADAPTER_FOLDER,
        lambda folder, _: dress(folder, adapter, config, latest, key),
    )


def _template(federation: Path) -> Adapter:
    from anabranch.coordinator.federation import START_FOLDER
    from anabranch.vectors.peft_folder import read_adapter

    return read_adapter(federation / START_FOLDER)


def _key(federation: Path, config: FederationConfig, *, needed: bool) -> PrivateKey | None:
    """The coordinator's key, where the federation is signed.

    Raises:
        ValueError: It is needed and not there, or cannot be used.
    """
    from anabranch.coordinator.registry import COORDINATOR, KEYS_FOLDER, coordinator_key

    there: Any = (federation / KEYS_FOLDER / f"{COORDINATOR}.key").exists()
    return coordinator_key(federation) if config.signed and (needed or there) else None

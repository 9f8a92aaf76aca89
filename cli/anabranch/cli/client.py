"""``anabranch client``: enrol, and take part without a SuperNode, by way of the API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.client_run import run_command
from anabranch.cli.output import print_json, stdout
from anabranch.cli.remote import Api, Cert, Json, Name, connected

client_app = typer.Typer(
    name="client",
    help="Enrol with a coordinator; take part without a SuperNode.",
    no_args_is_help=True,
)
client_app.command("run")(run_command)


@client_app.command("enrol")
def enrol_command(
    invitation: Annotated[Path, typer.Argument(help="What the coordinator's admin handed over.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for key and certificate.")],
    key: Annotated[
        Path | None, typer.Option(help="NAME.key that signs your updates: it is enrolled too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Get a certificate for an invitation; the private key never leaves this machine."""
    from anabranch.client.api.credentials import read_invitation
    from anabranch.client.api.enrolling import enrol
    from anabranch.wire.keys import read_private

    about = enrol(read_invitation(invitation), out, None if key is None else read_private(key))
    if as_json:
        print_json(about)
        return
    stdout.print(
        f"{out}: {about['name']} of {about['organisation']}, {about['role']} in "
        f"{', '.join(about['federations'])}", markup=False, soft_wrap=True,
    )  # fmt: skip


@client_app.command("rotate")
def rotate_command(cert: Cert, api: Api = None) -> None:
    """Get a new key and certificate in place of those in the folder."""
    from anabranch.client.api.credentials import Credentials
    from anabranch.client.api.enrolling import rotate

    credentials = Credentials(cert)
    about = rotate(credentials, api or str(credentials.about["address"]))
    stdout.print(f"{cert}: a new certificate of {about['name']}", markup=False)


@client_app.command("join")
def join_command(
    federation: Name,
    cert: Cert,
    api: Api = None,
    leave: Annotated[bool, typer.Option("--leave", help="Take part no longer.")] = False,
) -> None:
    """Be asked in rounds from the next one on, without a SuperNode."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        caller.call("Uploads.Join", pb.JoinRequest(federation=federation, leave=leave))
    stdout.print(f"{federation}: {'left' if leave else 'joined'}", markup=False)


@client_app.command("order")
def order_command(
    federation: Name,
    cert: Cert,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for plan.json and start.bin.")],
    api: Api = None,
) -> None:
    """Fetch what the round under way asks of you: its plan, signed, and the adapter to start from.

    Ends with 1 while there is nothing to do.
    """
    from anabranch.client.api.transfer import download
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        found = caller.call("Uploads.Order", pb.OrderRequest(federation=federation))
        if not found.plan:
            why = "your update is in" if found.admitted else "no round asks for anything of you"
            stdout.print(f"{federation}: {why}", markup=False)
            raise typer.Exit(1)
        out.mkdir(parents=True, exist_ok=True)
        for name in ("plan.json", "plan.sig", "start.bin"):
            (out / name).unlink(missing_ok=True)
        (out / "plan.json").write_text(found.plan)
        if found.plan_signature:
            (out / "plan.sig").write_text(
                f"{found.plan_key_id.hex()} {found.plan_signature.hex()}\n"
            )
        if found.start_bytes:
            download(caller, federation, "start", out / "start.bin")
    stdout.print(f"{out}: what to do", markup=False)


@client_app.command("upload")
def upload_command(
    federation: Name,
    update: Annotated[Path, typer.Argument(help="The encoded update.")],
    cert: Cert,
    api: Api = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A claim of its training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload an update; called again after a cut, it goes on where it ended."""
    from anabranch.client.api.transfer import upload
    from anabranch.wire.header import read_manifest

    data = update.read_bytes()
    number = read_manifest(data).meta.round
    with connected(cert, api) as caller:
        digest = upload(caller, federation, number, data, dict(map(_metric, metric or [])))
    if as_json:
        print_json({"round": number, "artifact": digest, "bytes": len(data)})
        return
    stdout.print(f"{federation}: admitted in round {number} as {digest}", markup=False)


@client_app.command("download")
def download_command(
    federation: Name,
    which: Annotated[str, typer.Argument(help="A round, a tag, latest, a hash's beginning.")],
    cert: Cert,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write, a new one.")],
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Download an encoded adapter; called again after a cut, it goes on where it ended."""
    from anabranch.client.api.transfer import download

    with connected(cert, api) as caller:
        size, digest = download(caller, federation, which, out)
    if as_json:
        print_json({"bytes": size, "sha256": digest})
        return
    stdout.print(f"{out}: {size} bytes, sha256 {digest}", markup=False)


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--metric {text!r}: give NAME=NUMBER") from None

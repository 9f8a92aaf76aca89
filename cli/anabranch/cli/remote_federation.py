"""Commands of ``anabranch federation`` that only an API answers, as create and events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.output import print_json, stdout
from anabranch.cli.remote import Api, Cert, Json, Name, connected, remote_start

PART_BYTES = 256 << 10


def add_remote(app: typer.Typer) -> None:
    """Add the commands to those that also read a folder."""
    app.command("create")(create_command)
    app.command("start")(start_command)
    app.command("events")(events_command)
    app.command("rounds")(rounds_command)
    app.command("receipts")(receipts_command)
    app.command("published")(published_command)
    app.command("withdraw")(withdraw_command)


def create_command(
    folder: Annotated[
        Path,
        typer.Argument(help="Holds federation.toml, start/, and nodes/ with a KEY.pub of each."),
    ],
    cert: Cert,
    api: Api = None,
) -> None:
    """Create a federation at a coordinator, of a folder here."""
    import tomllib

    from anabranch.wire.v1 import coordinator_pb2 as pb

    config = (folder / "federation.toml").read_text()
    name = str(tomllib.loads(config).get("name", ""))

    def parts() -> Iterator[Any]:
        yield pb.CreateRequest(header=pb.CreateHeader(federation=name, config=config))
        files = [(path.name, path) for path in sorted((folder / "start").glob("adapter_*"))]
        keys = sorted((folder / "nodes").glob("*.pub"))
        for file_name, path in (*files, *((f"nodes/{path.name}", path) for path in keys)):
            with path.open("rb") as file:
                while data := file.read(PART_BYTES):
                    yield pb.CreateRequest(file=pb.StartFile(name=file_name, data=data))

    with connected(cert, api) as caller:
        caller.call("Federations.Create", parts(), wait=True)
    stdout.print(f"{name}: created", markup=False)


def start_command(
    federation: Name,
    cert: Cert,
    api: Api = None,
    task: Annotated[
        str, typer.Option(help="What its nodes train, of the coordinator's; if it has several.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Have a federation's rounds run, until it is drained, aborted, or they are over.

    The coordinator looks at what would not work first, and gives it a port, which its nodes call.
    """
    from dataclasses import asdict

    now = remote_start(federation, task, cert, api).service
    assert now is not None
    if as_json:
        print_json({"federation": federation, **asdict(now)})
        return
    stdout.print(
        f"{federation}: started on port {now.port}, task {now.task}; it is taken up within a "
        "second, if `coordinator up` runs; else when it starts", markup=False, soft_wrap=True,
    )  # fmt: skip


def events_command(
    federation: Name,
    cert: Cert,
    api: Api = None,
    after: Annotated[int, typer.Option(help="Cursor of the last event you have.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what happens.")] = False,
) -> None:
    """Print what happened, one JSON object a line; its cursor is where to go on."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    request = pb.EventsRequest(federation=federation, after=after, once=not follow)
    with connected(cert, api) as caller:
        for one in caller.stream("Federations.Events", request):
            row = {"cursor": one.cursor, "time_s": one.time_s, "kind": one.kind}
            print(json.dumps(row | {"facts": json.loads(one.facts)}), flush=True)


def rounds_command(federation: Name, cert: Cert, api: Api = None, as_json: Json = False) -> None:
    """List the rounds that are over."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        request = pb.ListRoundsRequest(federation=federation)
        found = list(caller.stream("Federations.ListRounds", request))
    if as_json:
        names = ("round", "status", "admitted", "refused", "bytes_up", "bytes_down", "seconds")
        print_json([{name: getattr(one, name) for name in (*names, "reason")} for one in found])
        return
    for one in found:
        line = f"{one.round:>4}  {one.status:<11}  {one.admitted} admitted, {one.refused} refused"
        stdout.print(f"{line}  {one.reason}".rstrip(), markup=False, soft_wrap=True)


def receipts_command(
    federation: Name,
    cert: Cert,
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder.")],
    api: Api = None,
) -> None:
    """Write a federation's receipts as files, oldest first, as they were signed."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    out.mkdir(parents=True, exist_ok=False)
    count = 0
    with connected(cert, api) as caller:
        request = pb.ReceiptsRequest(federation=federation)
        for count, one in enumerate(caller.stream("Federations.Receipts", request), start=1):
            (out / f"receipt-{count:06}.json").write_bytes(one.content)
    stdout.print(f"{count} receipts in {out}", markup=False)


def published_command(federation: Name, cert: Cert, api: Api = None, as_json: Json = False) -> None:
    """List what a federation has published; `anabranch client download` fetches it."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        request = pb.ListAdaptersRequest(federation=federation)
        found = list(caller.stream("Adapters.ListAdapters", request))
    rows = [
        {
            "round": one.round, "kind": one.kind, "adapter_hash": one.adapter_hash,
            "artifact": one.digest, "tags": list(one.tags), "in_service": one.in_service,
        }
        for one in found
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    for one in found:
        mark = "*" if one.in_service else " "
        line = f"{mark} {one.round:>4}  {one.kind:<10}  {one.adapter_hash[:16]}"
        stdout.print(f"{line}  {' '.join(one.tags)}".rstrip(), markup=False, soft_wrap=True)


def withdraw_command(
    federation: Name,
    clients: Annotated[list[str], typer.Argument(metavar="CLIENT...", help="Whose updates.")],
    cert: Cert,
    api: Api = None,
) -> None:
    """Take clients' updates back: every merge since is done again without them."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        request = pb.WithdrawRequest(federation=federation, clients=clients)
        found = caller.call("Federations.Withdraw", request, wait=True)
    stdout.print(
        f"{federation}: {len(found.redone)} merges done again; in service as round {found.round}: "
        f"{found.adapter_hash}", markup=False, soft_wrap=True,
    )  # fmt: skip

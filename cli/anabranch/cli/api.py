"""``anabranch coordinator api`` and ``invite``: serve the API, and let the first peers in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.coordinator import Form, LogFormat
from anabranch.cli.output import print_json, stdout

Config = Annotated[Path, typer.Argument(help="The API's configuration, api.toml.")]


def api_command(
    config: Config,
    json: Annotated[bool, typer.Option("--json", help="Print the ports as JSON.")] = False,
    log_format: LogFormat = Form.TEXT,
) -> None:
    """Serve the coordinator's gRPC API until SIGTERM or an interruption.

    It serves every federation in one folder beside the processes that run their rounds, and may be
    stopped and started at any time. Calls that run get some seconds to end.
    """
    import asyncio
    import signal

    from anabranch.coordinator import logs
    from anabranch.coordinator.api.config import load_api
    from anabranch.coordinator.api.server import ApiServer

    logs.configure(log_format.value)

    async def serve() -> None:
        server, stopped = ApiServer(load_api(config)), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        await server.start()
        if json:
            print_json({"port": server.port, "enrol_port": server.enrol_port})
        else:
            stdout.print(
                f"serving on port {server.port}, enrolment on {server.enrol_port}", markup=False
            )
        await stopped.wait()
        await server.stop()

    asyncio.run(serve())


def invite_command(
    config: Config,
    name: Annotated[str, typer.Argument(help="What the peer is called; a client's vote is its.")],
    organisation: Annotated[str, typer.Option(help="Whose it is.")],
    role: Annotated[str, typer.Option(help="admin, operator, auditor or client.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The invitation to write, a new file.")],
    federation: Annotated[
        list[str] | None, typer.Option(help="A federation it takes part in; * stands for all.")
    ] = None,
    host: Annotated[str, typer.Option(help="Name of this machine for peers.")] = "localhost",
    hours: Annotated[float | None, typer.Option(help="How long it may be used.")] = None,
) -> None:
    """Write an invitation, on the coordinator's own machine: so the first admin comes in.

    Whoever holds the file can enrol, once, with `anabranch client enrol`.
    """
    from anabranch.client.api.credentials import Invitation
    from anabranch.coordinator.api.audit import AuditLog
    from anabranch.coordinator.api.authority import Authority
    from anabranch.coordinator.api.config import load_api
    from anabranch.coordinator.api.identity import Identity, Role
    from anabranch.coordinator.api.peers import Grant, Peers

    loaded = load_api(config)
    if role not in list(Role):
        raise ValueError(f"role is {role!r}; give one of {', '.join(Role)}")
    if out.exists():
        raise FileExistsError(17, "there is such a file; give another name", str(out))
    loaded.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, peers = Authority(loaded.state), Peers(loaded.state / "peers.db")
    grant = Grant(Identity(organisation, name, Role(role)), tuple(federation or ()))
    token, _ = peers.invite(grant, (hours or loaded.invitation_hours) * 3600)
    peers.close()
    AuditLog(loaded.state / "audit.jsonl").append(
        address="here", method="invite", outcome="done", code="", reason="", serial="",
        facts={
            "organisation": organisation, "name": name, "role": role,
            "federations": list(grant.federations),
        },
    )  # fmt: skip
    Invitation(token, authority.pem, f"{host}:{loaded.port}", f"{host}:{loaded.enrol_port}").write(
        out
    )
    stdout.print(f"{out}  hand it to {name}: who holds it can enrol, once", markup=False)

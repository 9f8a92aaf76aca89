"""Commands that call a coordinator's API: how they reach it, and what they ask of federations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from anabranch.client.api.caller import Caller
    from anabranch.coordinator.rounds.standing import Standing
    from anabranch.wire.v1.coordinator_pb2 import StatusReply

_CERT = typer.Option("--cert", help="The folder that `anabranch client enrol` wrote.")
Cert = Annotated[Path, _CERT]
MayCert = Annotated[Path | None, _CERT]
Api = Annotated[
    str | None, typer.Option("--api", metavar="HOST:PORT", help="Another address than enrolled at.")
]
Json = Annotated[bool, typer.Option("--json", help="For other programs.")]
Name = Annotated[str, typer.Argument(metavar="FEDERATION", help="Its name at the coordinator.")]


def connected(cert: Path, api: str | None) -> Caller:
    """A connection to the coordinator that a folder's certificate is of.

    Raises:
        ValueError: The folder holds no certificate.
    """
    from anabranch.client.api.caller import Caller
    from anabranch.client.api.credentials import Credentials

    credentials = Credentials(cert)
    return Caller(api or str(credentials.about["address"]), credentials)


def remote_standing(name: str, cert: Path, api: str | None) -> Standing:
    """Where a federation stands, as its coordinator says."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        return _standing(caller.call("Federations.Status", pb.StatusRequest(federation=name)))


def remote_start(name: str, task: str, cert: Path, api: str | None) -> Standing:
    """Have a federation's rounds run; how it stands now."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        request = pb.StartRequest(federation=name, task=task)
        return _standing(caller.call("Federations.Start", request, wait=True))


def _standing(found: StatusReply) -> Standing:
    from anabranch.coordinator.rounds.service import Service
    from anabranch.coordinator.rounds.standing import Standing

    said = found.service
    return Standing(
        federation=found.federation, run=found.run, want=found.want, rounds=found.rounds,
        done=found.done, published=found.published, abandoned=found.abandoned,
        round=found.round or None, state=found.state or None, asked=tuple(found.asked),
        admitted=tuple(found.admitted), refused=dict(found.refused),
        adapter_hash=found.adapter_hash or None, last=found.last, over=found.over,
        service=Service(said.started, said.port, said.task, said.by, said.why)
        if found.HasField("service") else None, running=found.running,
    )  # fmt: skip


def remote_ask(name: str, want: str, cert: Path, api: str | None) -> None:
    """Ask something of a federation's coordinator."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        caller.call("Federations.Ask", pb.AskRequest(federation=name, want=want))

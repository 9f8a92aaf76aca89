"""``anabranch peers``: what an admin or auditor sees and does about who is enrolled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.output import print_json, stdout
from anabranch.cli.remote import Api, Cert, Json, connected

peers_app = typer.Typer(
    name="peers", help="Invite, list and revoke peers; read the audit log.", no_args_is_help=True
)


@peers_app.command("invite")
def invite_command(
    name: Annotated[str, typer.Argument(help="What the peer is called.")],
    organisation: Annotated[str, typer.Option(help="Whose it is.")],
    role: Annotated[str, typer.Option(help="admin, operator, auditor or client.")],
    federation: Annotated[list[str], typer.Option(help="One it takes part in; * is all.")],
    enrol_address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where it is to enrol.")],
    cert: Cert,
    out: Annotated[Path, typer.Option("-o", "--out", help="The invitation to write.")],
    api: Api = None,
) -> None:
    """Write an invitation: who holds the file can enrol, once."""
    from anabranch.client.api.credentials import Invitation
    from anabranch.client.api.enrolling import ROLES
    from anabranch.wire.v1 import coordinator_pb2 as pb

    numbers = {word: number for number, word in ROLES.items()}
    if role not in numbers:
        raise ValueError(f"role is {role!r}; give one of {', '.join(numbers)}")
    if out.exists():
        raise FileExistsError(17, "there is such a file; give another name", str(out))
    with connected(cert, api) as caller:
        request = pb.InviteRequest(
            organisation=organisation, name=name, role=numbers[role], federations=federation
        )
        found = caller.call("Peers.Invite", request)
        Invitation(found.token, found.ca_pem, caller.address, enrol_address).write(out)
    stdout.print(f"{out}  hand it to {name}: who holds it can enrol, once", markup=False)


@peers_app.command("list")
def list_command(cert: Cert, api: Api = None, as_json: Json = False) -> None:
    """List certificates, of peers that take part in what you take part in."""
    from anabranch.client.api.enrolling import ROLES
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        found = list(caller.stream("Peers.ListPeers", pb.ListPeersRequest()))
    if as_json:
        names = ("organisation", "name", "serial", "not_after_s", "revoked")
        print_json(
            [
                {name: getattr(one, name) for name in names}
                | {"role": ROLES[one.role], "federations": list(one.federations)}
                for one in found
            ]
        )
        return
    for one in found:
        state = "revoked" if one.revoked else "enrolled"
        stdout.print(
            f"{one.name:<20}  {ROLES[one.role]:<8}  {state:<8}  {one.organisation}  "
            f"{' '.join(one.federations)}", markup=False, soft_wrap=True,
        )  # fmt: skip


@peers_app.command("revoke")
def revoke_command(
    name: Annotated[str, typer.Argument(help="The peer.")],
    cert: Cert,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    api: Api = None,
) -> None:
    """Take nothing from a peer any more, from its next call and its next update on."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    with connected(cert, api) as caller:
        found = caller.call("Peers.Revoke", pb.RevokeRequest(name=name, reason=reason))
    stdout.print(f"{name}: {found.certificates} certificates revoked", markup=False)


@peers_app.command("audit")
def audit_command(
    cert: Cert,
    api: Api = None,
    after: Annotated[int, typer.Option(help="Number of the last entry you have.")] = 0,
) -> None:
    """Print the audit log as it stands, a line of canonical JSON each; a whole one is checked."""
    from anabranch.wire.v1 import coordinator_pb2 as pb

    lines: list[bytes] = []
    with connected(cert, api) as caller:
        for one in caller.stream("Peers.Audit", pb.AuditRequest(after=after)):
            lines.append(one.line)
            print(one.line.decode(), flush=True)
    if not after:
        from anabranch.coordinator.api.audit import check_audit

        check_audit(iter(lines))

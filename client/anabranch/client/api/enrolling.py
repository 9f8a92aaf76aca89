"""Enrolment and renewal from a peer's side. Loads no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from anabranch.client.api.caller import Caller
from anabranch.client.api.credentials import Credentials, Invitation, new_request
from anabranch.wire.keys import PrivateKey
from anabranch.wire.service import enrolment_statement
from anabranch.wire.v1 import coordinator_pb2 as pb

ROLES = {
    pb.ROLE_ADMIN: "admin",
    pb.ROLE_OPERATOR: "operator",
    pb.ROLE_AUDITOR: "auditor",
    pb.ROLE_CLIENT: "client",
}


def enrol(
    invitation: Invitation, folder: Path, update_key: PrivateKey | None = None
) -> dict[str, Any]:
    """Get a certificate for an invitation.

    Args:
        invitation: It is used up.
        folder: Where key and certificate go, a new one.
        update_key: A client's key that signs its updates, for it to be enrolled too.

    Returns:
        Whom the certificate binds.

    Raises:
        CallError: The coordinator refused, or was not reached.
        FileExistsError: The folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(17, "there is something already; give a new folder", str(folder))
    key_pem, csr_pem = new_request(folder.name or "peer")
    request = pb.EnrolRequest(token=invitation.token, csr_pem=csr_pem)
    if update_key is not None:
        token_hash = hashlib.sha256(invitation.token.encode()).digest()
        request.update_key = update_key.public.raw
        request.update_key_signature = update_key.sign(enrolment_statement(token_hash, csr_pem))
    with Caller(invitation.enrol_address, invitation.ca_pem) as caller:
        reply = caller.call("Enrolment.Enrol", request)
    about = {"address": invitation.address, **_about(reply)}
    Credentials(folder).write(key_pem, reply.certificate_pem, reply.ca_pem, about)
    return about


def rotate(credentials: Credentials, address: str) -> dict[str, Any]:
    """Get a new key and certificate in place of those in a folder.

    Raises:
        CallError: The coordinator refused, or was not reached; the old ones stay.
    """
    key_pem, csr_pem = new_request(str(credentials.about.get("name", "peer")))
    with Caller(address, credentials) as caller:
        reply = caller.call("Peers.Rotate", pb.RotateRequest(csr_pem=csr_pem))
    about = {**credentials.about, **_about(reply)}
    credentials.write(key_pem, reply.certificate_pem, reply.ca_pem, about)
    return about


def _about(reply: Any) -> dict[str, Any]:
    return {
        "organisation": reply.organisation,
        "name": reply.name,
        "role": ROLES[reply.role],
        "federations": list(reply.federations),
        "not_after_s": reply.not_after_s,
    }

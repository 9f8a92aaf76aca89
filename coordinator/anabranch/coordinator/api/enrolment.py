"""Peers: invited, enrolled, given a new certificate, revoked; and the audit log, read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc import StatusCode

from anabranch.coordinator.api.audit import AuditLog
from anabranch.coordinator.api.authority import Authority
from anabranch.coordinator.api.config import ApiConfig
from anabranch.coordinator.api.guard import call
from anabranch.coordinator.api.identity import Identity, Role
from anabranch.coordinator.api.peers import (
    EVERY,
    Grant,
    Issued,
    NotEnrolledError,
    Peers,
    token_hash,
)
from anabranch.coordinator.api.refusal import RefusedCallError
from anabranch.coordinator.api.shelf import Shelf
from anabranch.coordinator.registry import client_keys, enrol, revoke
from anabranch.wire.keys import RAW_BYTES, PublicKey
from anabranch.wire.service import enrolment_statement
from anabranch.wire.v1 import coordinator_pb2 as pb

ROLES = {
    pb.ROLE_ADMIN: Role.ADMIN,
    pb.ROLE_OPERATOR: Role.OPERATOR,
    pb.ROLE_AUDITOR: Role.AUDITOR,
    pb.ROLE_CLIENT: Role.CLIENT,
}
NUMBERS = {role: number for number, role in ROLES.items()}


class Enrolment:
    """The services ``Enrolment`` and ``Peers``.

    Args:
        config: How long things hold.
        authority: Issues certificates.
        peers: The register.
        audit: The log.
        shelf: The federations, whose lists of keys follow.
    """

    def __init__(
        self, config: ApiConfig, authority: Authority, peers: Peers, audit: AuditLog, shelf: Shelf
    ) -> None:
        self._config, self._authority, self._peers = config, authority, peers
        self._audit, self._shelf = audit, shelf

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.Certificate:  # noqa: N802
        """A certificate for a one-time token."""
        return await asyncio.to_thread(self._enrol, request, call().facts)

    async def Rotate(self, request: pb.RotateRequest, context: Any) -> pb.Certificate:  # noqa: N802
        """A new certificate in place of the caller's."""
        now = call()

        def renew() -> pb.Certificate:
            old = self._peers.find(now.serial)
            assert old is not None  # the guard found it
            made, pem = self._issue(request.csr_pem, old.grant)
            self._peers.renew(
                old, f"{made.serial_number:x}", made.not_valid_after_utc.timestamp(),
                self._config.overlap_s,
            )  # fmt: skip
            now.facts["issued"] = f"{made.serial_number:x}"
            return self._certificate(pem, old.grant, made.not_valid_after_utc.timestamp())

        return await asyncio.to_thread(renew)

    async def Invite(self, request: pb.InviteRequest, context: Any) -> pb.Invitation:  # noqa: N802
        """A one-time token: an admin invites to federations that it takes part in itself."""
        own = call().granted
        if request.role not in ROLES:
            raise RefusedCallError("role-unknown", "name a role")
        outside = [name for name in request.federations if not own.covers(name)]
        if outside or (EVERY in request.federations and EVERY not in own.federations):
            raise RefusedCallError(
                "federation", "you take no part in all of these federations yourself",
                StatusCode.PERMISSION_DENIED,
            )  # fmt: skip
        identity = Identity(request.organisation, request.name, ROLES[request.role])
        grant = Grant(identity, tuple(request.federations))
        call().facts.update(
            organisation=identity.organisation, name=identity.name, role=identity.role.value,
            federations=list(grant.federations),
        )  # fmt: skip
        valid_s = request.valid_s or self._config.invitation_hours * 3600
        try:
            token, not_after_s = await asyncio.to_thread(self._peers.invite, grant, valid_s)
        except NotEnrolledError as error:
            raise _refused(error) from error
        return pb.Invitation(token=token, not_after_s=int(not_after_s), ca_pem=self._authority.pem)

    async def Revoke(self, request: pb.RevokeRequest, context: Any) -> pb.RevokeReply:  # noqa: N802
        """Take nothing from a peer any more: its certificates, and keys that signed its updates."""
        own, facts = call().granted, call().facts
        facts.update(name=request.name[:100], reason=request.reason[:300])

        def take_away() -> int:
            held = self._peers.named(request.name)
            if not held or not _within(held[-1].grant, own):
                raise RefusedCallError(
                    "peer", f"no peer {request.name[:100]!r} of yours", StatusCode.NOT_FOUND
                )
            count = self._peers.revoke(request.name)
            for name in self._shelf.names(held[-1].grant):
                folder = self._shelf.folder / name
                ring = client_keys(folder)
                for key in ring.enrolled.values():
                    if key.name == request.name and key.id not in ring.revoked:
                        revoke(folder, key.id.hex())
            return count

        return pb.RevokeReply(certificates=await asyncio.to_thread(take_away))

    async def ListPeers(  # noqa: N802
        self, request: pb.ListPeersRequest, context: Any
    ) -> AsyncIterator[pb.Peer]:
        """The peers that take part in what the caller takes part in."""
        own = call().granted
        rows = await asyncio.to_thread(self._peers.every)
        for row in rows:
            if _within(row.grant, own):
                yield _peer(row)

    async def Audit(  # noqa: N802
        self, request: pb.AuditRequest, context: Any
    ) -> AsyncIterator[pb.AuditEntry]:
        """The log from an entry on, for who takes part in every federation."""
        if EVERY not in call().granted.federations:
            raise RefusedCallError(
                "federation", 'the log is of all federations: it takes a peer of "*"',
                StatusCode.PERMISSION_DENIED,
            )  # fmt: skip
        for number, line in self._audit.entries(request.after):
            yield pb.AuditEntry(number=number, line=line)

    def _enrol(self, request: pb.EnrolRequest, facts: dict[str, Any]) -> pb.Certificate:
        try:
            grant = self._peers.look(request.token)
            who = grant.identity
            facts.update(
                organisation=who.organisation, name=who.name, role=who.role.value,
                federations=list(grant.federations),
            )  # fmt: skip
            key = _update_key(request, who)
            made, pem = self._issue(request.csr_pem, grant)
            not_after_s = made.not_valid_after_utc.timestamp()
            self._peers.redeem(request.token, f"{made.serial_number:x}", not_after_s)
        except NotEnrolledError as error:
            raise _refused(error) from error
        facts["issued"] = f"{made.serial_number:x}"
        if key is not None:
            self._let_sign(key, grant)
        return self._certificate(pem, grant, not_after_s)

    def _let_sign(self, key: PublicKey, grant: Grant) -> None:
        for name in self._shelf.names(grant):
            folder = self._shelf.folder / name
            if key.id not in client_keys(folder).enrolled:
                enrol(folder, [key])

    def _issue(self, csr_pem: bytes, grant: Grant) -> tuple[Any, bytes]:
        try:
            return self._authority.issue(
                csr_pem, grant.identity, self._config.certificate_days * 86_400
            )
        except ValueError as error:
            raise RefusedCallError("csr", str(error)) from error

    def _certificate(self, pem: bytes, grant: Grant, not_after_s: float) -> pb.Certificate:
        who = grant.identity
        return pb.Certificate(
            certificate_pem=pem, ca_pem=self._authority.pem, organisation=who.organisation,
            name=who.name, role=NUMBERS[who.role], federations=grant.federations,
            not_after_s=int(not_after_s),
        )  # fmt: skip


def _update_key(request: pb.EnrolRequest, who: Identity) -> PublicKey | None:
    """The key that a client will sign updates with; it has shown that it holds it."""
    if not request.update_key:
        return None
    key = PublicKey(who.name, request.update_key)
    statement = enrolment_statement(token_hash(request.token), request.csr_pem)
    sound = len(request.update_key) == RAW_BYTES and who.role is Role.CLIENT
    if not sound or not key.verifies(request.update_key_signature, statement):
        raise RefusedCallError(
            "update-key", "the update key is not 32 bytes of a client's, or did not sign this"
        )
    return key


def _within(grant: Grant, own: Grant) -> bool:
    """Whether a peer takes part in nothing that another takes no part in."""
    if EVERY in grant.federations:
        return EVERY in own.federations
    return all(own.covers(name) for name in grant.federations)


def _peer(row: Issued) -> pb.Peer:
    who = row.grant.identity
    return pb.Peer(
        organisation=who.organisation, name=who.name, role=NUMBERS[who.role],
        federations=row.grant.federations, serial=row.serial, not_after_s=int(row.not_after_s),
        revoked=row.revoked_s is not None,
    )  # fmt: skip


def _refused(error: NotEnrolledError) -> RefusedCallError:
    return RefusedCallError(error.code, str(error), StatusCode.PERMISSION_DENIED)

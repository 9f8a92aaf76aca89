"""Who may call what: one table, and nothing outside it may be called."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.coordinator.api.identity import Role

ADMIN, OPERATOR, AUDITOR, CLIENT = Role.ADMIN, Role.OPERATOR, Role.AUDITOR, Role.CLIENT


@dataclass(frozen=True)
class Rule:
    """Who may call a method.

    Attributes:
        roles: Those roles.
        anyone: Callers without a certificate too.
        audited: Every call is in the audit log; of others the refused ones are.
    """

    roles: frozenset[Role]
    anyone: bool = False
    audited: bool = False


def _rule(*roles: Role, anyone: bool = False, audited: bool = False) -> Rule:
    return Rule(frozenset(roles), anyone, audited)


EVERYBODY = (ADMIN, OPERATOR, AUDITOR, CLIENT)
WIRE = "/anabranch.wire.v1"

TABLE: dict[str, Rule] = {
    f"{WIRE}.Enrolment/Enrol": _rule(*EVERYBODY, anyone=True, audited=True),
    f"{WIRE}.Peers/Rotate": _rule(*EVERYBODY, audited=True),
    f"{WIRE}.Peers/Invite": _rule(ADMIN, audited=True),
    f"{WIRE}.Peers/Revoke": _rule(ADMIN, audited=True),
    f"{WIRE}.Peers/ListPeers": _rule(ADMIN, AUDITOR),
    f"{WIRE}.Peers/Audit": _rule(ADMIN, AUDITOR),
    f"{WIRE}.Federations/Create": _rule(ADMIN, audited=True),
    f"{WIRE}.Federations/ListFederations": _rule(*EVERYBODY),
    f"{WIRE}.Federations/Status": _rule(*EVERYBODY),
    f"{WIRE}.Federations/Start": _rule(ADMIN, OPERATOR, audited=True),
    f"{WIRE}.Federations/Ask": _rule(ADMIN, OPERATOR, audited=True),
    f"{WIRE}.Federations/Events": _rule(ADMIN, OPERATOR, AUDITOR),
    f"{WIRE}.Federations/ListRounds": _rule(*EVERYBODY),
    f"{WIRE}.Federations/Receipts": _rule(*EVERYBODY),
    f"{WIRE}.Federations/Withdraw": _rule(ADMIN, audited=True),
    f"{WIRE}.Adapters/ListAdapters": _rule(*EVERYBODY),
    f"{WIRE}.Adapters/Download": _rule(*EVERYBODY, audited=True),
    f"{WIRE}.Uploads/Join": _rule(CLIENT, audited=True),
    f"{WIRE}.Uploads/Order": _rule(CLIENT),
    f"{WIRE}.Uploads/Offset": _rule(CLIENT),
    f"{WIRE}.Uploads/Upload": _rule(CLIENT, audited=True),
    "/grpc.health.v1.Health/Check": _rule(*EVERYBODY, anyone=True),
    "/grpc.health.v1.Health/Watch": _rule(*EVERYBODY),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _rule(*EVERYBODY),
}

"""How a call is refused: one exception, which the guard turns into a status and an audit entry."""

from __future__ import annotations

from grpc import StatusCode

from anabranch.wire.errors import one_line


class RefusedCallError(Exception):
    """A call that is not served.

    Attributes:
        code: Short reason for machines.
        status: gRPC's status.
        reason: The reason in words, one line.
    """

    def __init__(
        self, code: str, reason: str, status: StatusCode = StatusCode.INVALID_ARGUMENT
    ) -> None:
        super().__init__(reason)
        self.code, self.status, self.reason = code, status, one_line(reason)


def not_yours(federation: str) -> RefusedCallError:
    """The same whether there is such a federation or not."""
    return RefusedCallError(
        "federation",
        f"no federation {federation[:100]!r} that you take part in",
        StatusCode.PERMISSION_DENIED,
    )


STATUS = {
    "duplicate": StatusCode.ALREADY_EXISTS,
    "closed": StatusCode.FAILED_PRECONDITION,
    "unasked": StatusCode.FAILED_PRECONDITION,
    "no-room": StatusCode.RESOURCE_EXHAUSTED,
}
"""What a refusal of admission is to a caller; INVALID_ARGUMENT where nothing is said here."""


def refused_update(code: str, reason: str) -> RefusedCallError:
    """A refusal of admission, with the same code."""
    return RefusedCallError(code, reason, STATUS.get(code, StatusCode.INVALID_ARGUMENT))

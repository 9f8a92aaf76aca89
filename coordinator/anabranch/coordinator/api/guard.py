"""The one door: who calls, whether they may, and what is written down about it.

Every handler is wrapped here, those of gRPC's own services too. A method that ``roles.TABLE`` lacks
cannot be called.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import StatusCode

from anabranch.coordinator.api.audit import AuditLog
from anabranch.coordinator.api.handshakes import Handshakes
from anabranch.coordinator.api.identity import shown
from anabranch.coordinator.api.peers import Grant, Peers
from anabranch.coordinator.api.quotas import OverQuotaError, Quotas
from anabranch.coordinator.api.refusal import RefusedCallError
from anabranch.coordinator.api.roles import TABLE
from anabranch.coordinator.store import FullError, StoreError
from anabranch.wire.errors import one_line
from anabranch.wire.service import CODE_KEY

log = logging.getLogger("anabranch.coordinator.api")


@dataclass
class Call:
    """A call that was let in.

    Attributes:
        method: Its path.
        address: Where it came from.
        grant: What its peer was enrolled for; None for one without a certificate.
        serial: Number of the certificate it showed.
        facts: What its audit entry says besides.
    """

    method: str
    address: str
    grant: Grant | None
    serial: str
    facts: dict[str, Any]

    @property
    def peer(self) -> str:
        """What its quotas count under: the certificate's owner, else its address without port."""
        if self.grant is None:
            return self.address.rpartition(":")[0]
        return self.grant.identity.name

    @property
    def granted(self) -> Grant:
        """Its grant; the table has let no call without one in."""
        assert self.grant is not None
        return self.grant


_call: ContextVar[Call] = ContextVar("anabranch_api_call")


def call() -> Call:
    """The call that is being served."""
    return _call.get()


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets calls in or refuses them.

    Args:
        peers: Who is enrolled.
        audit: Where it is written down.
        quotas: How often each may call.
        handshakes: Told of every connection that came to a call.
        stall_s: Seconds in which a peer has to take what is sent to it.
    """

    def __init__(
        self,
        peers: Peers,
        audit: AuditLog,
        quotas: Quotas,
        handshakes: Handshakes,
        stall_s: float,
    ) -> None:
        self._peers, self._audit, self._stall_s = peers, audit, stall_s
        self._quotas, self._handshakes = quotas, handshakes
        self._writing: set[asyncio.Future[None]] = set()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """Wrap the handler of a method; one that there is not is refused and audited alike."""
        handler = await continuation(details)
        method = details.method
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._one(_nothing, method))
        if handler.request_streaming and handler.response_streaming:
            make, serve = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        elif handler.request_streaming:
            make, serve = grpc.stream_unary_rpc_method_handler, handler.stream_unary
        elif handler.response_streaming:
            make, serve = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, serve = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        wrap = self._many if handler.response_streaming else self._one
        return make(wrap(serve, method), handler.request_deserializer, handler.response_serializer)

    def admit(self, method: str, context: Any) -> Call:
        """Let a call in.

        Raises:
            RefusedCallError: It may not, and why; ``_call`` is set as far as its peer is known.
        """
        address = context.peer()
        now = Call(method, address, None, "", {})
        _call.set(now)
        rule = TABLE.get(method)
        held = context.auth_context().get("x509_pem_cert")
        if held:
            self._handshakes.call(address)
            now.grant, now.serial = self._known(held[0])
        self._quotas.take(now.peer)
        if rule is None:
            raise RefusedCallError("method", "there is no such method", StatusCode.UNIMPLEMENTED)
        if now.grant is None:
            if rule.anyone:
                return now
            raise RefusedCallError(
                "no-certificate", "show a certificate; `anabranch client enrol` gets one",
                StatusCode.UNAUTHENTICATED,
            )  # fmt: skip
        if now.grant.identity.role not in rule.roles:
            raise RefusedCallError(
                "role", f"{now.grant.identity.role} may not call this",
                StatusCode.PERMISSION_DENIED,
            )  # fmt: skip
        return now

    def check(self) -> None:
        """Look again whether the peer of a call that goes on for long still counts.

        Raises:
            RefusedCallError: ``revoked`` or ``expired``.
        """
        self._still(call().serial)

    def _known(self, pem: bytes) -> tuple[Grant, str]:
        try:
            held = shown(pem)
        except ValueError as error:
            raise RefusedCallError(
                "unknown-certificate", str(error), StatusCode.UNAUTHENTICATED
            ) from error
        grant = self._still(held.serial)
        if grant.identity != held.identity:
            raise RefusedCallError(
                "unknown-certificate", "the register has this number for another peer",
                StatusCode.UNAUTHENTICATED,
            )  # fmt: skip
        if held.not_after_s < time.time():
            raise RefusedCallError(
                "expired", "the certificate has ended", StatusCode.UNAUTHENTICATED
            )
        return grant, held.serial

    def _still(self, serial: str) -> Grant:
        issued = self._peers.find(serial)
        if issued is None:
            raise RefusedCallError(
                "unknown-certificate", "the certificate is not in the register",
                StatusCode.UNAUTHENTICATED,
            )  # fmt: skip
        call().grant, call().serial = issued.grant, serial
        if issued.revoked_s is not None:
            raise RefusedCallError(
                "revoked", "the certificate was revoked", StatusCode.UNAUTHENTICATED
            )
        if issued.not_after_s < time.time():
            raise RefusedCallError(
                "expired", "the certificate has ended; enrol again", StatusCode.UNAUTHENTICATED
            )
        return issued.grant

    def _one(self, serve: Any, method: str) -> Any:
        async def served(request: Any, context: Any) -> Any:
            try:
                self.admit(method, context)
                reply = await serve(request, context)
            except asyncio.CancelledError:
                await self._cut()
                raise
            except Exception as error:
                await self._refuse(error, context)
                raise AssertionError("abort raises") from error
            await self._done()
            return reply

        return served

    def _many(self, serve: Any, method: str) -> Any:
        async def served(request: Any, context: Any) -> None:
            try:
                self.admit(method, context)
                replies = serve(request, context)
                # gRPC's own watch of a server's health writes by itself.
                if inspect.isawaitable(replies):
                    await replies
                else:
                    async for reply in replies:
                        await self._send(reply, context)
            except asyncio.CancelledError:
                await self._cut()
                raise
            except Exception as error:
                await self._refuse(error, context)
            await self._done()

        return served

    async def _send(self, reply: Any, context: Any) -> None:
        """Send one of several replies; a peer that does not take it holds nothing up for long."""
        try:
            async with asyncio.timeout(self._stall_s):
                await context.write(reply)
        except TimeoutError:
            raise RefusedCallError(
                "stalled", f"nothing was taken for {self._stall_s:g} s; go on from where it ended",
                StatusCode.DEADLINE_EXCEEDED,
            ) from None  # fmt: skip

    async def _done(self) -> None:
        if TABLE[call().method].audited:
            await self._write("done", "", "")

    async def _cut(self) -> None:
        """Its caller ended a call, or was lost, before it was served."""
        if TABLE[call().method].audited:
            await self._write("cut", "", "the caller ended it, or its connection did")

    async def _refuse(self, error: Exception, context: Any) -> None:
        """Write a refusal down, then end the call with it."""
        if isinstance(error, grpc.aio.AbortError):
            raise error
        refused = as_refusal(error)
        if not isinstance(refused, OverQuotaError) or refused.told:
            await self._write("refused", refused.code, refused.reason)
        await context.abort(
            refused.status, refused.reason, trailing_metadata=((CODE_KEY, refused.code),)
        )

    async def _write(self, outcome: str, code: str, reason: str) -> None:
        now = call()
        who: dict[str, str] = {}
        if now.grant is not None:
            one = now.grant.identity
            who = {"organisation": one.organisation, "name": one.name, "role": one.role.value}
        entry = {
            "address": now.address, "method": now.method[:200], "outcome": outcome, "code": code,
            "reason": reason[:500], "serial": now.serial, **who, "facts": now.facts,
        }  # fmt: skip
        try:
            # A call that its caller has ended is cancelled, and this must not be.
            writing = asyncio.ensure_future(asyncio.to_thread(self._audit.append, **entry))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)
            await asyncio.shield(writing)
        # What was done is done, and what was refused stays so.
        except (OSError, ValueError) as error:
            log.error("the audit log could not be written (%s): %s", error, entry)


def as_refusal(error: Exception) -> RefusedCallError:
    """What a caller is told of an error; of one that nobody foresaw, nothing but that."""
    if isinstance(error, RefusedCallError):
        return error
    if isinstance(error, FullError):
        return RefusedCallError("no-room", str(error), StatusCode.RESOURCE_EXHAUSTED)
    if isinstance(error, StoreError):
        return RefusedCallError("no-store", str(error), StatusCode.UNAVAILABLE)
    if isinstance(error, ValueError):
        return RefusedCallError("invalid", one_line(str(error)))
    log.exception("a call failed", exc_info=error)
    return RefusedCallError(
        "internal", "the coordinator failed at this; its log says why", StatusCode.INTERNAL
    )


async def _nothing(request: Any, context: Any) -> Any:
    raise AssertionError("the table has no such method")

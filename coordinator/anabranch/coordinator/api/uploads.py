"""Uploads of updates, in parts and resumable, by clients that keep no SuperNode."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from grpc import StatusCode

from anabranch.coordinator.admission import RefusedError
from anabranch.coordinator.api.config import LimitsConfig
from anabranch.coordinator.api.guard import call
from anabranch.coordinator.api.identity import DIGEST
from anabranch.coordinator.api.intake import Sound
from anabranch.coordinator.api.quotas import Quotas
from anabranch.coordinator.api.refusal import RefusedCallError, refused_update
from anabranch.coordinator.api.shelf import Served, Shelf
from anabranch.coordinator.api.spool import Arrival, Spool, Wanted
from anabranch.coordinator.rounds.uploaders import joined, note_joined
from anabranch.wire.signing import sign_plan
from anabranch.wire.v1 import coordinator_pb2 as pb

T = TypeVar("T")

METRICS = 16
"""Most claims that a header may hold."""


@dataclass
class Pace:
    """Whether a stream keeps moving: so many bytes, or its end, in every so many seconds.

    Attributes:
        seconds: Of a window.
        least_bytes: What it has to bring.
    """

    seconds: float
    least_bytes: int
    _ends_s: float = 0.0
    _brought: int = 0

    async def read(self, context: Any) -> Any:
        """The stream's next message, or ``EOF`` of gRPC's.

        Raises:
            RefusedCallError: ``stalled``.
        """
        now = time.monotonic()
        if not self._ends_s:
            self._ends_s = now + self.seconds
        try:
            async with asyncio.timeout(max(0.0, self._ends_s - now)):
                return await context.read()
        except TimeoutError:
            raise RefusedCallError(
                "stalled",
                f"less than {self.least_bytes} bytes came in {self.seconds:g} s; ask for the "
                "offset and go on from there",
                StatusCode.DEADLINE_EXCEEDED,
            ) from None

    def brought(self, size_bytes: int) -> None:
        """Count bytes that came."""
        self._brought += size_bytes
        if self._brought >= self.least_bytes:
            self._brought, self._ends_s = 0, time.monotonic() + self.seconds


class Uploads:
    """The service ``Uploads``.

    Args:
        shelf: The federations.
        spool: Where unfinished uploads are.
        quotas: Holds each client to one upload at a time.
        limits: What uploads may take up.
    """

    def __init__(self, shelf: Shelf, spool: Spool, quotas: Quotas, limits: LimitsConfig) -> None:
        self._shelf, self._spool, self._quotas, self._limits = shelf, spool, quotas, limits
        self._reading = asyncio.Semaphore(limits.uploads)
        self._admitting = asyncio.Semaphore(limits.admissions)

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:  # noqa: N802
        """Let the caller be asked in rounds from the next one on, or no longer."""
        served, client = await self._served(request.federation)
        if not request.leave:
            _as_call(served.intake.check_uploads)

        def note() -> None:
            if (client in joined(served.store)) == request.leave:
                note_joined(served.store, client, not request.leave)

        await asyncio.to_thread(note)
        return pb.JoinReply()

    async def Order(self, request: pb.OrderRequest, context: Any) -> pb.OrderReply:  # noqa: N802
        """What the round under way asks of the caller."""
        served, client = await self._served(request.federation)
        _as_call(served.intake.check_uploads)
        return await asyncio.to_thread(_order, served, client)

    async def Offset(self, request: pb.UploadHeader, context: Any) -> pb.OffsetReply:  # noqa: N802
        """How much of an update is here."""
        served, client = await self._served(request.federation)
        wanted = _wanted(request, client)
        held = await asyncio.to_thread(served.intake.held, client, wanted.round)
        if held is not None and held.digest == wanted.digest:
            return pb.OffsetReply(offset=wanted.size_bytes, admitted=True)
        return pb.OffsetReply(offset=self._spool.offset(wanted))

    async def Upload(self, unused: Any, context: Any) -> pb.UploadReply:  # noqa: N802
        """Take an update: header, then bytes; admit it once it is whole."""
        pace = Pace(self._limits.stall_s, self._limits.stall_kb << 10)
        first = await pace.read(context)
        if not isinstance(first, pb.UploadPart) or first.WhichOneof("part") != "header":
            raise RefusedCallError("no-header", "an upload begins with its header")
        header = first.header
        served, client = await self._served(header.federation)
        wanted = _wanted(header, client)
        call().facts.update(
            federation=served.config.name, round=wanted.round, digest=wanted.digest,
            size_bytes=wanted.size_bytes,
        )  # fmt: skip
        with self._quotas.only_one(client, f"upload to {served.config.name}"):
            async with self._reading:
                await self._check_size(served, wanted)
                arrival = await self._take(wanted, header.offset, context)
            # Few are in memory at a time; the disk and the database serve many at once.
            async with self._admitting:
                sound = await asyncio.to_thread(
                    self._examine, served, wanted, arrival, dict(header.metrics)
                )
            row = await asyncio.to_thread(self._keep, served, wanted, sound, arrival)
        return pb.UploadReply(digest=row)

    async def _check_size(self, served: Served, wanted: Wanted) -> None:
        """Refuse what cannot be an update of the round, before a byte of it is kept."""

        def look() -> int:
            return served.intake.expected(wanted.client, wanted.round)[1]

        most = await asyncio.to_thread(_as_call, look)
        if wanted.size_bytes > most:
            raise RefusedCallError(
                "too-large", f"{wanted.size_bytes} bytes are over the round's limit of {most}",
                StatusCode.RESOURCE_EXHAUSTED,
            )  # fmt: skip

    async def _take(self, wanted: Wanted, said: int, context: Any) -> Arrival:
        """Read bytes to the disk until all are there."""
        arrival = await asyncio.to_thread(self._spool.begin, wanted)
        try:
            if said != arrival.offset:
                raise RefusedCallError(
                    "wrong-offset",
                    f"{arrival.offset} bytes are here, the upload goes on from {said}",
                    StatusCode.OUT_OF_RANGE,
                )
            await self._read(wanted, arrival, context)
        finally:
            arrival.close()
            if arrival.offset == 0:
                self._spool.drop(wanted)
        return arrival

    async def _read(self, wanted: Wanted, arrival: Arrival, context: Any) -> None:
        pace = Pace(self._limits.stall_s, self._limits.stall_kb << 10)
        while (offset := arrival.offset) < wanted.size_bytes:
            part = await pace.read(context)
            if not isinstance(part, pb.UploadPart):
                raise RefusedCallError(
                    "cut-off", f"it ended at {offset} of {wanted.size_bytes} bytes; ask for the "
                    "offset and go on from there",
                )  # fmt: skip
            data = part.data
            # A copy; while the next part is waited for neither is kept, nor both for the disk:
            # with 64 uploads that is a hundred megabytes.
            del part
            if not data or offset + len(data) > wanted.size_bytes:
                self._spool.drop(wanted)
                raise RefusedCallError(
                    "too-large" if data else "no-data",
                    f"a part of {len(data)} bytes does not fit after {offset} of "
                    f"{wanted.size_bytes}",
                )
            await asyncio.to_thread(arrival.add, data)
            pace.brought(len(data))
            del data

    def _examine(
        self, served: Served, wanted: Wanted, arrival: Arrival, metrics: dict[str, float]
    ) -> Sound:
        if not arrival.holds(wanted):
            self._spool.drop(wanted)
            raise RefusedCallError(
                "bad-digest", "the bytes are not those of the digest; send them again",
                StatusCode.DATA_LOSS,
            )  # fmt: skip
        data = arrival.read()
        with self._dropping(wanted):
            return _as_call(
                lambda: served.intake.examine(wanted.client, wanted.round, data, metrics)
            )

    def _keep(self, served: Served, wanted: Wanted, sound: Sound, arrival: Arrival) -> str:
        with self._dropping(wanted):
            row = _as_call(lambda: served.intake.keep(sound, arrival.path, wanted.digest))
        self._spool.drop(wanted)
        return row.digest

    @contextmanager
    def _dropping(self, wanted: Wanted) -> Iterator[None]:
        """Drop what is refused, but for want of room: then it may be tried again."""
        try:
            yield
        except RefusedCallError as error:
            if error.code != "no-room":
                self._spool.drop(wanted)
            raise

    async def _served(self, federation: str) -> tuple[Served, str]:
        grant = call().granted
        return await self._shelf.take(grant, federation), grant.identity.name


def _wanted(header: pb.UploadHeader, client: str) -> Wanted:
    """What a header announces.

    Raises:
        RefusedCallError: ``header``.
    """
    problem = ""
    if not DIGEST.fullmatch(header.digest):
        problem = f"the digest {header.digest[:80]!r} is no sha256 in hexadecimal"
    elif header.size_bytes < 1 or header.round < 1 or header.offset < 0:
        problem = "size and round begin with 1, the offset with 0"
    elif len(header.metrics) > METRICS or not all(map(math.isfinite, header.metrics.values())):
        problem = f"at most {METRICS} finite metrics are taken"
    if problem:
        raise RefusedCallError("header", problem)
    return Wanted(header.federation, client, header.round, header.digest, header.size_bytes)


def _order(served: Served, client: str) -> pb.OrderReply:
    now = served.intake.under_way()
    if now is None:
        return pb.OrderReply()
    if served.intake.held(client, now.number) is not None:
        return pb.OrderReply(admitted=True)
    if client not in now.asked:
        return pb.OrderReply()
    start = served.intake.start(client, now)
    text = start.plan.model_dump_json()
    reply = pb.OrderReply(plan=text, start_bytes=len(start.blob or b""))
    if start.key is not None:
        reply.plan_key_id = start.key.public.id
        reply.plan_signature = sign_plan(text, start.key)
    return reply


def _as_call(look: Callable[[], T]) -> T:
    """What admission refuses, refused to the caller with the same code."""
    try:
        return look()
    except RefusedError as error:
        raise refused_update(error.code, str(error)) from error

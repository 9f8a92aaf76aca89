"""Adapters: what was published, and its bytes in parts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

from grpc import StatusCode

from anabranch.coordinator.api.guard import call
from anabranch.coordinator.api.identity import Role
from anabranch.coordinator.api.refusal import RefusedCallError
from anabranch.coordinator.api.shelf import Served, Shelf
from anabranch.coordinator.lineage import chosen, published
from anabranch.wire.v1 import coordinator_pb2 as pb

PART_BYTES = 256 << 10
START = "start"


class Adapters:
    """The service ``Adapters``.

    Args:
        shelf: The federations.
        most: Downloads at a time: each has its adapter in memory. Further ones wait.
    """

    def __init__(self, shelf: Shelf, most: int) -> None:
        self._shelf = shelf
        self._reading = asyncio.Semaphore(most)

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: Any
    ) -> AsyncIterator[pb.AdapterRow]:
        """Every published adapter, oldest first."""
        served = await self._served(request.federation)
        for row in await asyncio.to_thread(published, served.store):
            yield pb.AdapterRow(
                round=row.publication.round, kind=row.kind or "",
                adapter_hash=row.publication.adapter_hash, digest=row.publication.digest,
                tags=row.tags, in_service=row.in_service,
            )  # fmt: skip

    async def Download(  # noqa: N802
        self, request: pb.DownloadRequest, context: Any
    ) -> AsyncIterator[pb.DownloadPart]:
        """An encoded adapter from an offset on, and at the end its size and digest."""
        served, who = await self._served(request.federation), call().granted.identity
        call().facts.update(
            federation=served.config.name, which=request.which[:100], offset=request.offset
        )
        async with self._reading:
            if request.which == START:
                if who.role is not Role.CLIENT:
                    raise RefusedCallError(
                        "role", "a start is handed to clients", StatusCode.PERMISSION_DENIED
                    )
                blob = await asyncio.to_thread(_start, served, who.name)
            else:
                blob = await asyncio.to_thread(_blob, served, request.which)
            if not 0 <= request.offset <= len(blob):
                raise RefusedCallError(
                    "wrong-offset", f"{request.offset} is outside of {len(blob)} bytes",
                    StatusCode.OUT_OF_RANGE,
                )  # fmt: skip
            for begin in range(request.offset, len(blob), PART_BYTES):
                yield pb.DownloadPart(data=blob[begin : begin + PART_BYTES])
            digest = hashlib.sha256(blob).hexdigest()
            yield pb.DownloadPart(end=pb.DownloadEnd(size_bytes=len(blob), digest=digest))

    async def _served(self, federation: str) -> Served:
        return await self._shelf.take(call().granted, federation)


def _blob(served: Served, which: str) -> bytes:
    try:
        row = chosen(published(served.store), which)
        return served.store.get(row.publication.digest)
    except ValueError as error:
        raise RefusedCallError("adapter", str(error), StatusCode.NOT_FOUND) from error
    except KeyError as error:
        raise RefusedCallError(
            "adapter", f"the adapter is not kept any more: {error.args[0]}", StatusCode.NOT_FOUND
        ) from error


def _start(served: Served, client: str) -> bytes:
    now = served.intake.under_way()
    if now is None or client not in now.asked:
        raise RefusedCallError(
            "unasked", "no round asks for anything of you", StatusCode.FAILED_PRECONDITION
        )
    return served.intake.start(client, now).blob or b""

"""Federations: what is there, how they stand, what happens, and what operators ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from typing import Any

from grpc import StatusCode

from anabranch.coordinator.api.config import LimitsConfig
from anabranch.coordinator.api.creating import Creating
from anabranch.coordinator.api.guard import call
from anabranch.coordinator.api.identity import Role
from anabranch.coordinator.api.quotas import Quotas
from anabranch.coordinator.api.refusal import RefusedCallError
from anabranch.coordinator.api.shelf import Served, Shelf
from anabranch.coordinator.api.starting import Starting
from anabranch.coordinator.api.uploads import Pace
from anabranch.coordinator.rounds.control import Want, ask
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import TakenError
from anabranch.coordinator.supervision.lease import supervised
from anabranch.coordinator.withdrawing import withdraw
from anabranch.wire.v1 import coordinator_pb2 as pb

TOLD = frozenset(
    {
        "begun", "planned", "state", "admitted", "refused", "round", "stopped", "ended", "scoring",
        "meet-failed", "not-carried", "joined", "control", "service",
    }
)  # fmt: skip
"""Kinds of what the event stream tells. Others may be secrets, as what opens a receipt."""
TOLD_IN_PRIVATE = {"admitted": {"round", "client"}, "refused": {"round", "client", "code"}}
"""What is told of one update where a federation is private: nothing that depends on its content."""
LOOK_S = 0.5
"""Seconds between two looks for new events."""
BATCH = 500


class Federations:
    """The service ``Federations``.

    Args:
        shelf: The federations.
        quotas: Holds each peer to one stream of events per federation.
        limits: What creating one may take up.
        starting: Starts them.
        check: Raises once the peer of the running call counts no longer.
    """

    def __init__(
        self,
        shelf: Shelf,
        quotas: Quotas,
        limits: LimitsConfig,
        starting: Starting,
        check: Callable[[], None],
    ) -> None:
        self._starting = starting
        self._shelf, self._quotas, self._limits, self._check = shelf, quotas, limits, check
        self._redoing = asyncio.Semaphore(1)

    async def Create(self, unused: Any, context: Any) -> pb.CreateReply:  # noqa: N802
        """Make a federation's folder, of its configuration and its start adapter."""
        pace = Pace(self._limits.stall_s, self._limits.stall_kb << 10)
        first = await pace.read(context)
        if not isinstance(first, pb.CreateRequest) or first.WhichOneof("part") != "header":
            raise RefusedCallError("no-header", "it begins with its header")
        name = first.header.federation
        call().facts.update(federation=name[:100])
        if not call().granted.covers(name):
            raise RefusedCallError(
                "federation", f"you take no part in {name[:100]!r}", StatusCode.PERMISSION_DENIED
            )
        creating = Creating(self._shelf.folder, name, self._limits.start_mb << 20)
        await asyncio.to_thread(creating.begin, first.header.config)
        try:
            while isinstance(part := await pace.read(context), pb.CreateRequest):
                await asyncio.to_thread(creating.add, part.file.name, part.file.data)
                pace.brought(len(part.file.data))
            await asyncio.to_thread(creating.finish)
        finally:
            await asyncio.to_thread(creating.drop)
        return pb.CreateReply(federation=name)

    async def ListFederations(  # noqa: N802
        self, request: pb.ListFederationsRequest, context: Any
    ) -> pb.ListFederationsReply:
        """Names of those that the caller takes part in."""
        names = await asyncio.to_thread(self._shelf.names, call().granted)
        return pb.ListFederationsReply(federations=names)

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:  # noqa: N802
        """Where one stands."""
        return await self._status(await self._served(request.federation))

    async def Start(  # noqa: N802
        self, request: pb.StartRequest, context: Any
    ) -> pb.StatusReply:
        """Let its rounds be run, on a SuperLink of its own."""
        served, by = await self._served(request.federation), call().granted.identity.name
        call().facts.update(federation=served.config.name, task=request.task[:100])
        now = await asyncio.to_thread(self._starting.start, served, request.task, by)
        call().facts.update(port=now.port)
        return await self._status(served)

    async def Ask(self, request: pb.AskRequest, context: Any) -> pb.StatusReply:  # noqa: N802
        """Ask its coordinator to run, pause, drain or abort."""
        served, by = await self._served(request.federation), call().granted.identity.name
        call().facts.update(federation=served.config.name, want=request.want[:20])
        if request.want not in list(Want):
            raise RefusedCallError("want", f"ask for one of {', '.join(Want)}")
        await asyncio.to_thread(ask, served.store, Want(request.want), by)
        return await self._status(served)

    async def Events(  # noqa: N802
        self, request: pb.EventsRequest, context: Any
    ) -> AsyncIterator[pb.Event]:
        """What happened since a cursor, then what happens."""
        served, after = await self._served(request.federation), request.after
        who = call().granted.identity.name
        with self._quotas.only_one(who, f"stream of events of {served.config.name}"):
            while True:
                found = await asyncio.to_thread(served.store.history, after, BATCH)
                for one in found:
                    after = one.cursor
                    if one.event in TOLD:
                        facts, only = one.facts, TOLD_IN_PRIVATE.get(one.event)
                        if only is not None and served.config.privacy is not None:
                            facts = {name: facts[name] for name in facts.keys() & only}
                        yield pb.Event(
                            cursor=one.cursor, time_s=one.time_s, kind=one.event,
                            facts=json.dumps(facts),
                        )  # fmt: skip
                if len(found) < BATCH:
                    if request.once:
                        return
                    await asyncio.sleep(LOOK_S)
                    await asyncio.to_thread(self._check)

    async def ListRounds(  # noqa: N802
        self, request: pb.ListRoundsRequest, context: Any
    ) -> AsyncIterator[pb.RoundRow]:
        """Rounds that are over."""
        served = await self._served(request.federation)
        for row in await asyncio.to_thread(served.store.notes, "round"):
            if row["round"] > request.after:
                yield pb.RoundRow(
                    round=row["round"], status=row.get("status", ""),
                    admitted=row.get("admitted", 0), refused=row.get("refused", 0),
                    bytes_up=row.get("bytes_up", 0), bytes_down=row.get("bytes_down", 0),
                    seconds=row.get("seconds", 0.0), reason=row.get("reason", ""),
                )  # fmt: skip

    async def Receipts(  # noqa: N802
        self, request: pb.ReceiptsRequest, context: Any
    ) -> AsyncIterator[pb.Receipt]:
        """Its receipts, as they were signed."""
        served = await self._served(request.federation)
        found = await asyncio.to_thread(served.store.receipts)
        for content in found[max(0, request.after) :]:
            yield pb.Receipt(content=content)

    async def Withdraw(  # noqa: N802
        self, request: pb.WithdrawRequest, context: Any
    ) -> pb.WithdrawReply:
        """Do every merge again without some clients."""
        served, clients = await self._served(request.federation), list(request.clients)
        call().facts.update(federation=served.config.name, clients=clients[:100])
        if not clients:
            raise RefusedCallError("clients", "name the clients")
        async with self._redoing:
            try:
                publication, redone = await asyncio.to_thread(
                    withdraw, served.store, served.config, served.template, clients, served.key
                )
            except TakenError as error:
                raise RefusedCallError("taken", str(error), StatusCode.ABORTED) from error
        return pb.WithdrawReply(
            round=publication.round, adapter_hash=publication.adapter_hash, redone=redone
        )

    async def _status(self, served: Served) -> pb.StatusReply:
        found = await asyncio.to_thread(standing, served.config, served.store)
        who = call().granted.identity
        mine = [who.name] if who.role is Role.CLIENT else None

        def seen(names: tuple[str, ...]) -> list[str]:
            return [name for name in names if mine is None or name in mine]

        said = found.service
        if said is not None and mine is not None:
            said = replace(said, by="")
        return pb.StatusReply(
            federation=found.federation, run=found.run, want=found.want, rounds=found.rounds,
            done=found.done, published=found.published, abandoned=found.abandoned,
            round=found.round or 0, state=found.state or "", asked=seen(found.asked),
            admitted=seen(found.admitted), refused=found.refused,
            adapter_hash=found.adapter_hash or "", last=found.last, over=found.over,
            service=pb.Service(**asdict(said)) if said else None,
            running=await asyncio.to_thread(supervised, served.folder),
        )  # fmt: skip

    async def _served(self, federation: str) -> Served:
        return await self._shelf.take(call().granted, federation)

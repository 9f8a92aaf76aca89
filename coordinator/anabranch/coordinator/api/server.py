"""The server: ports, services, the guard in front of them all, health and reflection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from anabranch.coordinator.api.adapters import Adapters
from anabranch.coordinator.api.audit import AuditLog
from anabranch.coordinator.api.authority import Authority
from anabranch.coordinator.api.config import ApiConfig
from anabranch.coordinator.api.enrolment import Enrolment
from anabranch.coordinator.api.federations import Federations
from anabranch.coordinator.api.guard import Guard
from anabranch.coordinator.api.handshakes import Handshakes
from anabranch.coordinator.api.peers import Peers
from anabranch.coordinator.api.quotas import Quotas
from anabranch.coordinator.api.shelf import Shelf
from anabranch.coordinator.api.spool import Spool
from anabranch.coordinator.api.starting import Starting
from anabranch.coordinator.api.transport import credentials, handlers, listen, new_server
from anabranch.coordinator.api.uploads import Uploads
from anabranch.coordinator.memory import GivingBack, few_heaps
from anabranch.wire.service import methods

log = logging.getLogger("anabranch.coordinator.api")

LOOK_S = 1.0
"""Seconds between two looks after handshakes and health."""
SWEEP_S = 60.0
"""Seconds between two looks for uploads that nobody went on with."""
GRACE_S = 5.0
"""Seconds that calls get to end when the server stops."""
THREADS = 16
"""Threads for the disk, the database and admission."""


class ApiServer:
    """Serves the API from ``start`` to ``stop``.

    Args:
        config: How.

    Attributes:
        port: Where callers with certificates are served, once started.
        enrol_port: Where those without are.
        peers: The register.
        authority: Issues certificates.
        audit: The log.
    """

    def __init__(self, config: ApiConfig) -> None:
        self._config = config
        state, limits = config.state, config.limits
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.authority = Authority(state)
        self.peers = Peers(state / "peers.db")
        self.audit = AuditLog(state / "audit.jsonl")
        self._shelf = Shelf(config.federations)
        self._spool = Spool(state / "uploads")
        self._handshakes = Handshakes(limits.handshake_s)
        self._quotas = Quotas(limits.calls_per_s, limits.burst)
        self._health = health_aio.HealthServicer()
        self._memory = GivingBack()
        self.port = self.enrol_port = 0

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: A port is taken.
        """
        config, limits = self._config, self._config.limits
        few_heaps()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "api"))
        guard = Guard(self.peers, self.audit, self._quotas, self._handshakes, limits.stall_s)
        self._server = new_server(guard, limits, anonymous=False)
        self._door = new_server(guard, limits, anonymous=True)
        enrolment = Enrolment(config, self.authority, self.peers, self.audit, self._shelf)
        services = {
            "Enrolment": enrolment,
            "Peers": enrolment,
            "Federations": Federations(
                self._shelf, self._quotas, limits, Starting(self._shelf, config.flower), guard.check
            ),
            "Adapters": Adapters(self._shelf, limits.downloads),
            "Uploads": Uploads(self._shelf, self._spool, self._quotas, limits),
        }
        self._server.add_generic_rpc_handlers(handlers(services))
        self._door.add_generic_rpc_handlers(handlers({"Enrolment": enrolment}))
        for server in (self._server, self._door):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [handler.service_name() for handler in handlers(services)]
        reflection.enable_server_reflection(
            [*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], self._server
        )
        mutual = credentials(self.authority, config.names, True, self._handshakes.begin)
        plain = credentials(self.authority, config.names, False, lambda: None)
        self.port = listen(self._server, f"{config.host}:{config.port}", mutual)
        self.enrol_port = listen(self._door, f"{config.host}:{config.enrol_port}", plain)
        await self._server.start()
        await self._door.start()
        await self._tell(await asyncio.to_thread(self._sound))
        self._memory.start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Take no new call, let those that run end, close everything."""
        await self._health.enter_graceful_shutdown()
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        await asyncio.gather(self._server.stop(GRACE_S), self._door.stop(GRACE_S))
        await asyncio.to_thread(self._count_handshakes)
        await asyncio.to_thread(self._memory.stop)
        self._shelf.close()
        self.peers.close()

    async def wait(self) -> None:
        """Until it is stopped."""
        await self._server.wait_for_termination()

    def _sound(self) -> bool:
        """Whether the register answers and the folder of federations is there."""
        self.peers.find("")
        return self._config.federations.is_dir()

    async def _tell(self, sound: bool) -> None:
        serving = health_pb2.HealthCheckResponse
        state = serving.SERVING if sound else serving.NOT_SERVING
        for name in ("", *{f"anabranch.wire.v1.{one.service}" for one in methods().values()}):
            await self._health.set(name, state)

    async def _watch(self) -> None:
        swept_s = float("-inf")
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(self._count_handshakes)
                if time.monotonic() - swept_s >= SWEEP_S:
                    swept_s = time.monotonic()
                    await asyncio.to_thread(self._spool.sweep, self._config.limits.partial_s)
                await self._tell(await asyncio.to_thread(self._sound))
            # A look that failed is no reason to look no more.
            except Exception:
                log.exception("the API looked after itself and failed")
                await self._tell(False)

    def _count_handshakes(self) -> None:
        if count := self._handshakes.lost():
            self.audit.append(
                method="handshake", outcome="refused", code="handshake",
                reason="connections that came to no call: no certificate, one that this authority "
                "did not issue or that has ended, or a handshake left hanging",
                facts={"connections": count},
            )  # fmt: skip


@contextmanager
def serving(config: ApiConfig) -> Iterator[ApiServer]:
    """The API, served by a thread of this process while the block runs.

    Raises:
        OSError: A port is taken.
        ValueError: The folder of its state cannot be used.
    """
    started: Future[tuple[ApiServer, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        try:
            server, stopped = ApiServer(config), asyncio.Event()
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result((server, asyncio.get_running_loop(), stopped))
        await stopped.wait()
        await server.stop()

    with ThreadPoolExecutor(1, "api-server") as thread:
        running = thread.submit(asyncio.run, serve())
        server, loop, stopped = started.result()
        try:
            yield server
        finally:
            loop.call_soon_threadsafe(stopped.set)
            running.result()

"""The server: ports, services, the guard in front of them all, health and reflection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
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
from anabranch.coordinator.api.uploads import Uploads
from anabranch.coordinator.memory import give_back
from anabranch.wire.service import methods

log = logging.getLogger("anabranch.coordinator.api")

LOOK_S = 1.0
"""Seconds between two looks after handshakes, health and stale uploads."""
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
        self.port = self.enrol_port = 0

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: A port is taken.
        """
        config, limits = self._config, self._config.limits
        give_back()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "api"))
        guard = Guard(self.peers, self.audit, self._quotas, self._handshakes, limits.stall_s)
        self._server = grpc.aio.server(
            interceptors=[guard],
            maximum_concurrent_rpcs=limits.calls,
            options=[
                ("grpc.max_receive_message_length", limits.message_kb << 10),
                ("grpc.max_send_message_length", limits.message_kb << 10),
                ("grpc.max_concurrent_streams", limits.streams),
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
                # Whoever is gone without a word is noticed.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                # So may callers look; more often than this is an attack.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                # A slow reader of the disk holds the sender back, not its bytes in memory.
                ("grpc.http2.lookahead_bytes", 256 << 10),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.so_reuseport", 0),
            ],
        )
        enrolment = Enrolment(config, self.authority, self.peers, self.audit, self._shelf)
        services = {
            "Enrolment": enrolment,
            "Peers": enrolment,
            "Federations": Federations(self._shelf, self._quotas, limits, guard.check),
            "Adapters": Adapters(self._shelf, limits.downloads),
            "Uploads": Uploads(self._shelf, self._spool, self._quotas, limits),
        }
        self._server.add_generic_rpc_handlers(handlers(services))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [handler.service_name() for handler in handlers(services)]
        reflection.enable_server_reflection(
            [*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], self._server
        )
        key, certificate = self.authority.server_pair(config.names)
        pair = grpc.ssl_server_certificate_configuration([(key, certificate)], self.authority.pem)

        def begun() -> None:
            self._handshakes.begin()

        mutual = grpc.dynamic_ssl_server_credentials(pair, begun, True)
        plain = grpc.ssl_server_credentials([(key, certificate)])
        self.port = self._listen(config.port, mutual)
        self.enrol_port = self._listen(config.enrol_port, plain)
        await self._server.start()
        await self._tell(await asyncio.to_thread(self._sound))
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Take no new call, let those that run end, close everything."""
        await self._health.enter_graceful_shutdown()
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching
        await self._server.stop(GRACE_S)
        await asyncio.to_thread(self._count_handshakes)
        self._shelf.close()
        self.peers.close()

    async def wait(self) -> None:
        """Until it is stopped."""
        await self._server.wait_for_termination()

    def _listen(self, port: int, credentials: Any) -> int:
        address = f"{self._config.host}:{port}"
        try:
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise OSError(
                f"{address} cannot be listened on: {error}; choose another port"
            ) from error

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
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(self._count_handshakes)
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


def handlers(services: dict[str, Any]) -> tuple[Any, ...]:
    """GRPC's handlers of the services given, one per method of the .proto file.

    Args:
        services: By name; each has a coroutine or an asynchronous generator per method.
    """
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    by_service: dict[str, dict[str, Any]] = {}
    for path, one in methods().items():
        if one.service in services:
            make = makers[one.streams_up, one.streams_down]
            serve = getattr(services[one.service], one.name)
            full = path.split("/")[1]
            by_service.setdefault(full, {})[one.name] = make(
                serve, one.request.FromString, one.reply.SerializeToString
            )
    return tuple(
        grpc.method_handlers_generic_handler(name, rows) for name, rows in by_service.items()
    )


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

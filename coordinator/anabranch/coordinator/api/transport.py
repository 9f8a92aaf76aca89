"""gRPC servers and TLS of the API: limits, handlers, certificates that renew themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from anabranch.coordinator.api.authority import Authority
from anabranch.coordinator.api.config import LimitsConfig
from anabranch.wire.service import methods

CERTIFICATE_DAYS = 30.0
"""How long a certificate of the server's holds; a new one is made at half of it."""
READ_BUFFER_BYTES = 64 << 10
"""Most of a connection's bytes that gRPC takes from the system at a time."""
ANONYMOUS_CALLS = 64
"""Calls at a time of those who show no certificate: they get in nobody's way but their own."""
ANONYMOUS_AGE_S = 30
"""Seconds that a connection of theirs lasts."""


def new_server(guard: Any, limits: LimitsConfig, anonymous: bool) -> Any:
    """A server without ports and services.

    Args:
        guard: Stands in front of every handler.
        limits: What callers may take up.
        anonymous: It is for those without certificates.
    """
    options: list[tuple[str, int]] = [
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
        # A slow reader of the disk holds the sender back, not its bytes in memory: a stream that
        # nobody reads yet takes so much, one that is read as much as its message.
        ("grpc.http2.lookahead_bytes", 64 << 10),
        ("grpc.http2.bdp_probe", 0),
        # A connection waits for its next bytes with a buffer as large as the last ones came fast,
        # up to a message: 600 KiB each, for as long as it is open.
        ("grpc.experimental.tcp_max_read_buffer_size", READ_BUFFER_BYTES),
        ("grpc.so_reuseport", 0),
    ]
    if anonymous:
        # gRPC waits for a request's bytes before any of our code may lose patience.
        options.append(("grpc.max_connection_age_ms", ANONYMOUS_AGE_S * 1000))
        options.append(("grpc.max_connection_age_grace_ms", 5_000))
    calls = ANONYMOUS_CALLS if anonymous else limits.calls
    return grpc.aio.server(interceptors=[guard], maximum_concurrent_rpcs=calls, options=options)


def listen(server: Any, address: str, credentials: Any) -> int:
    """Let a server listen; returns its port.

    Raises:
        OSError: It cannot.
    """
    try:
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise OSError(f"{address} cannot be listened on: {error}; choose another port") from error


def credentials(
    authority: Authority, names: Sequence[str], mutual: bool, begun: Callable[[], None]
) -> Any:
    """A server's side of TLS.

    Args:
        authority: Issues its certificates, and those that callers show.
        names: What callers reach it by.
        mutual: Callers have to show one.
        begun: Called at each handshake.
    """

    def fresh() -> Any:
        pair = authority.server_pair(names, CERTIFICATE_DAYS)
        return grpc.ssl_server_certificate_configuration([pair], authority.pem if mutual else None)

    made_s = time.monotonic()

    def fetch() -> Any:
        nonlocal made_s
        begun()
        if time.monotonic() - made_s < CERTIFICATE_DAYS * 86_400 / 2:
            return None  # the one before still holds
        made_s = time.monotonic()
        return fresh()

    return grpc.dynamic_ssl_server_credentials(fresh(), fetch, mutual)


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

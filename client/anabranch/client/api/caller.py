"""Calls of the coordinator's API. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from anabranch.client.api.credentials import Credentials
from anabranch.wire.errors import one_line
from anabranch.wire.service import CODE_KEY, Method, methods

TIMEOUT_S = 30.0
"""Seconds a call may take, but for those that carry many bytes."""
MESSAGE_BYTES = 1088 << 10
ALIVE_S = 20.0
"""Seconds without a word after which a coordinator is asked whether it is there, and in which it
has to answer: a call that may take as long as it takes would wait for ever on a dead line."""


class CallError(RuntimeError):
    """A call that failed.

    Attributes:
        code: The coordinator's short reason; ``unavailable`` where it was not reached.
        refused: Whether the coordinator said no, to what was sent or to who sent it.
    """

    def __init__(self, code: str, reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.code, self.refused = code, refused

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        return 5 if self.refused else 6 if self.code == "unavailable" else 1


class Caller:
    """A connection to a coordinator.

    Args:
        address: ``HOST:PORT``.
        credentials: What this peer shows; or, to enrol, the authority's certificate in PEM.
        timeout_s: Seconds a call may take.
    """

    def __init__(
        self, address: str, credentials: Credentials | bytes, timeout_s: float = TIMEOUT_S
    ) -> None:
        shown = (
            credentials.channel()
            if isinstance(credentials, Credentials)
            else grpc.ssl_channel_credentials(credentials)
        )
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", int(1000 * ALIVE_S)),
            ("grpc.keepalive_timeout_ms", int(1000 * ALIVE_S)),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        self.address, self._timeout_s = address, timeout_s
        self._channel = grpc.secure_channel(address, shown, options=options)
        self._methods = {f"{one.service}.{one.name}": one for one in methods().values()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def call(self, name: str, request: Message | Iterator[Message], wait: bool = False) -> Any:
        """Call a method that gives one reply.

        Args:
            name: ``Service.Method``.
            request: What it is sent; an iterator where it takes several.
            wait: Take as long as it takes: the coordinator ends what does not move.

        Returns:
            Its reply.

        Raises:
            CallError: It failed.
        """
        timeout_s = None if wait else self._timeout_s
        try:
            return self._bound(self._methods[name])(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def stream(self, name: str, request: Message) -> Iterator[Any]:
        """Call a method that gives several replies, and yield them.

        Raises:
            CallError: It failed.
        """
        try:
            yield from self._bound(self._methods[name])(request)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def _bound(self, one: Method) -> Any:
        make = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
            (True, True): self._channel.stream_stream,
        }[one.streams_up, one.streams_down]
        return make(one.path, _bytes, one.reply.FromString)

    def _failed(self, error: Any) -> CallError:
        told = dict(error.trailing_metadata() or ())
        code, reason = told.get(CODE_KEY), one_line(error.details() or "")
        if code is not None:
            return CallError(str(code), f"{reason} ({code})", refused=True)
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            reason = (
                f"{self.address} does not answer, or refuses this certificate in the handshake: "
                f"{reason}"
            )
            return CallError("unavailable", reason, refused=False)
        name = error.code().name.lower().replace("_", "-")
        return CallError(name, f"{reason} ({name})", refused=False)


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()

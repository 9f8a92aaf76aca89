"""A line between two processes on loopback that can be cut, or swallow what is sent on it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Literal, Self

State = Literal["open", "cut", "dead", "deaf", "dumb"]
"""``cut``: connections end, and none is taken. ``dead``: they stand, and nothing passes; ``deaf``:
nothing passes to the server; ``dumb``: nothing passes from it."""


class Line:
    """Listens on a port of its own, and hands on to another one.

    Args:
        target: The port that it leads to.
        host: Where that is.
    """

    def __init__(self, target: int, host: str = "127.0.0.1") -> None:
        self._target = (host, target)
        self._state: State = "open"
        self._left: tuple[int, State] | None = None
        self._pairs: dict[socket.socket, tuple[socket.socket, bool]] = {}
        self._lost: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._woken, self._wake = socket.socketpair()
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        """Begin to hand on."""
        for sock in (self._listener, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all connections."""
        self._wake.send(b"q")
        self._thread.join(10)
        self._drop()
        for sock in (self._listener, self._woken, self._wake):
            sock.close()
        self._selector.close()

    def set(self, state: State) -> None:
        """Let it be so from now on."""
        self._state = state
        self._wake.send(b"s")

    def renew(self) -> None:
        """New connections pass from now on; those there are stay as they are, and never end."""
        self._state = "open"
        self._wake.send(b"r")

    def after(self, count: int, state: State) -> None:
        """Let it be so once so many more bytes have passed to the server."""
        self._left = count, state

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._woken:
                    word = self._woken.recv(1)
                    if word == b"q":
                        return
                    if word == b"r":
                        self._lost |= set(self._pairs)
                    if self._state == "cut":
                        self._drop()
                    self._listen_again()
                elif sock is self._listener:
                    self._accept()
                elif sock in self._pairs:
                    self._hand_on(sock)

    def _listen_again(self) -> None:
        """What a dead line does not read stays with the sender's system, and passes later."""
        for sock, (_, to_server) in self._pairs.items():
            passes = self._passes(to_server) and sock not in self._lost
            with contextlib.suppress(KeyError):
                self._selector.unregister(sock)
            if passes:
                self._selector.register(sock, selectors.EVENT_READ)

    def _passes(self, to_server: bool) -> bool:
        silent = {"dead": (True, False), "deaf": (True,), "dumb": (False,)}
        return to_server not in silent.get(self._state, ())

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._state == "cut":
            near.close()
            return
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:
            near.close()
            return
        self._pairs[near], self._pairs[far] = (far, True), (near, False)
        for sock in (near, far):
            sock.setblocking(True)
        self._listen_again()

    def _hand_on(self, sock: socket.socket) -> None:
        other, to_server = self._pairs[sock]
        left, state = self._left or (1 << 16, self._state)
        try:
            data = sock.recv(min(left, 1 << 16) if to_server else 1 << 16)
            if data:
                other.sendall(data)
                if to_server and self._left is not None:
                    self._left = (left - len(data), state) if left > len(data) else None
                    if self._left is None:
                        self.set(state)
                return
        except OSError:
            pass
        self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        other, _ = self._pairs.pop(sock)
        self._pairs.pop(other, None)
        for one in (sock, other):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(one)
            one.close()

    def _drop(self) -> None:
        while self._pairs:
            self._forget(next(iter(self._pairs)))

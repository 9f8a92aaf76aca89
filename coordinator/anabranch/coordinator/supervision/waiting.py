"""A process that has loaded what a ServerApp needs, and waits for the command line of one.

``python -m anabranch.coordinator.supervision.waiting FOLDER MODULE:FUNCTION [MODULE ...]``. Its
socket is there before anything is loaded: a command line that comes early waits for the rest of the
loading, which a process of its own would only begin.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from anabranch.coordinator.supervision.handover import SOCKET, TAKEN

TAKEN_FILE = "taken"
"""What the socket is called once a command line was taken."""
HEAR_S = 5.0
"""Seconds that a command line has to come in."""


def serve(folder: Path, function: str, modules: Sequence[str] = ()) -> None:
    """Load, wait for a command line, and call the function as if the process had been given it.

    Args:
        folder: Private; holds the socket.
        function: ``module:function``.
        modules: What is loaded beside it.
    """
    with _listening(folder) as server:
        for module in modules:
            import_module(module)
        call = _loaded(function)
        sys.argv = _taken(server)
        (folder / SOCKET).rename(folder / TAKEN_FILE)
    call()


@contextlib.contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        # From within its folder: the address of a socket has at most 108 bytes.
        with contextlib.chdir(folder):
            server.bind(SOCKET)
        server.listen()
        yield server


def _loaded(function: str) -> Callable[[], object]:
    module, _, name = function.partition(":")
    found: Callable[[], object] = getattr(import_module(module), name)
    return found


def _taken(server: socket.socket) -> list[str]:
    """The first command line that comes whole from somebody who still waits."""
    while True:
        peer, _ = server.accept()
        with peer, peer.makefile("r") as lines:
            peer.settimeout(HEAR_S)
            try:
                line: list[str] = json.loads(lines.readline())
                peer.sendall(TAKEN)
            except (OSError, ValueError):
                continue
            return line


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])

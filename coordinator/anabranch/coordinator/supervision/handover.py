"""What Flower starts in place of ``flwr-serverapp``: hands its command line to who waits for it.

A script of the standard library alone, since it stands between a new run and its ServerApp:
``python -IS`` has it done in some 40 ms. Where nobody takes the command line, it becomes the real
command, as if it had never been there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

SOCKET = "socket"
"""Name of the socket in its folder."""
TAKEN = b"+"
"""The answer of who takes a command line."""
PATIENCE_S = 20.0
"""Seconds to wait for it. Flower gives a ServerApp 30 s to ask for its input: this leaves some for
the real command."""


def handed_over(folder: str, line: list[str]) -> bool:
    """Offer a command line; returns whether it was taken.

    Args:
        folder: Holds the socket.
        line: The command's name, and its arguments.

    Raises:
        OSError: Nobody listens.
    """
    # From within its folder: the address of a socket has at most 108 bytes.
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE_S)
        peer.connect(SOCKET)
        peer.sendall(json.dumps(line).encode() + b"\n")
        try:
            return peer.recv(1) == TAKEN
        except TimeoutError:
            # An answer that came just now counts; one that would come later fails over there, so
            # that never two processes go on with the same command line.
            peer.shutdown(socket.SHUT_RD)
            return peer.recv(1) == TAKEN


def main() -> None:
    """Given the folder, the path of the real command, and what Flower gave it."""
    folder, real, *arguments = sys.argv[1:]
    try:
        taken = handed_over(folder, [real.rpartition("/")[2], *arguments])
    except OSError:
        taken = False
    if not taken:
        os.execv(real, [real, *arguments])


if __name__ == "__main__":
    main()

"""Child processes that do not outlive who started them, found again by a mark in their environment.

Flower's SuperLink starts processes of its own, in sessions of their own: a process group does not
hold them. They inherit the environment, and are found by it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from anabranch.wire.errors import one_line

MARK = "ANABRANCH_SUPERVISED"
"""Environment variable of every supervised process: the folder it works for."""

LOG_LINES = 3
"""Last lines of a log that say why a process died."""

COLOUR = re.compile(r"\x1b\[[0-9;]*m")

_PDEATHSIG = 1


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def start(arguments: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which the kernel kills when this thread ends.

    Args:
        arguments: The command line.
        log: File that its output is added to.
        env: Its environment.
    """
    libc, parent = _libc(), os.getpid()

    def dies_with_its_parent() -> None:
        if libc is not None:
            libc.prctl(_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the kernel was told
                os._exit(1)

    with log.open("ab") as file:
        return subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
            start_new_session=True, preexec_fn=dies_with_its_parent,
        )  # fmt: skip


def marked(mark: str) -> list[int]:
    """Processes with this mark in their environment, beside this one; none where /proc is not."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if wanted in environment and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def kill_marked(mark: str, patience_s: float = 10.0, spare: Collection[int] = ()) -> list[int]:
    """Kill every process with a mark, and wait until it is gone.

    Args:
        mark: Whose.
        patience_s: Seconds that one may take to go.
        spare: Processes that stay.

    Returns:
        Those that were there.

    Raises:
        RuntimeError: One does not go.
    """
    seen: list[int] = []
    end, clear = time.monotonic() + patience_s, 0
    # Twice: in the middle of an exec a process shows no environment.
    while clear < 2:
        left = [pid for pid in marked(mark) if pid not in spare]
        clear = 0 if left else clear + 1
        for pid in left:
            if pid not in seen:
                seen.append(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if left and time.monotonic() >= end:
            raise RuntimeError(f"process {left[0]} of {mark} cannot be killed; look what holds it")
        time.sleep(0.02)
    return seen


def end(child: subprocess.Popen[bytes], patience_s: float) -> None:
    """Ask a child to end; kill it if it does not."""
    child.terminate()
    try:
        child.wait(patience_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def how(code: int) -> str:
    """How a process ended, by its return code."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def tail(log: Path, keep: Callable[[str], bool] = lambda line: True) -> str:
    """The last lines of a log in one line; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    plain = COLOUR.sub("", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip() and keep(line)]
    return one_line(" | ".join(lines[-LOG_LINES:]))

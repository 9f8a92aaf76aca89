"""Starts a command's ranks on this machine, and speaks for one that dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOST = 3
"""Exit code of a rank that stops because another one is gone."""

_POLL_S = 0.05
_SETTLE_S = 1.0
"""Ranks that lost one stop by themselves, so that who ends first need not be who died."""

_GRACE_S = 10.0
"""For a rank that is asked to end, to remove what it began."""


def run_ranks(count: int, out: Path) -> int:
    """Run this command again as so many ranks, and wait for them.

    Rank 0 speaks for itself; of the others, only one that fails is heard.

    Args:
        count: How many.
        out: The folder they write; what they leave of it is removed.

    Returns:
        The exit code: 0, or that of the rank that failed.

    Raises:
        RuntimeError: A rank died; names it and the signal.
    """
    from anabranch.vectors.new_folder import begun

    others = begun(out)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="anabranch-") as meeting:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            ranks += (_start(rank, count, Path(meeting)) for rank in range(count))
            codes = _wait(ranks)
        finally:
            _end(ranks)
            signal.signal(signal.SIGTERM, before)
            for left in begun(out) - others:
                shutil.rmtree(left, ignore_errors=True)
        failed = _culprit(codes)
        if failed is None:
            return 0
        if codes[failed] < 0:
            name = signal.Signals(-codes[failed]).name
            hint = "; the machine may be out of memory: lower --budget-mb" * (name == "SIGKILL")
            raise RuntimeError(
                f"rank {failed} died (signal {-codes[failed]}, {name}), and nothing was written"
                + hint
            )
        sys.stderr.write(_heard(failed, Path(meeting)))
    return codes[failed]


def _start(rank: int, count: int, meeting: Path) -> subprocess.Popen[bytes]:
    from anabranch.aggregation.engine.shard import environment_of
    from anabranch.aggregation.ranks import Ranks

    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {
        "OMP_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        **os.environ,
        **environment_of(Ranks(rank, count, count), meeting),
    }
    command = [sys.executable, "-m", "anabranch.cli", *sys.argv[1:]]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with _errors(rank, meeting).open("wb") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def _errors(rank: int, meeting: Path) -> Path:
    return meeting / f"rank-{rank}"


def _heard(rank: int, meeting: Path) -> str:
    """What a rank said on stderr, unless it said it there itself."""
    return _errors(rank, meeting).read_text(errors="replace") if rank else ""


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes of those that ended by themselves: all, or some of which one failed."""
    until = float("inf")
    while time.monotonic() < until:
        codes = [process.poll() for process in ranks]
        if all(code is not None for code in codes):
            break
        if any(codes):
            until = min(until, time.monotonic() + _SETTLE_S)
        time.sleep(_POLL_S)
    return {rank: code for rank, code in enumerate(codes) if code is not None}


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask those that still run to end, and kill those that do not."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + _GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _culprit(codes: Mapping[int, int]) -> int | None:
    """The rank to blame: one that died, else one that failed, else one that lost the others."""
    failed = [rank for rank, code in codes.items() if code]
    return min(failed, key=lambda rank: (codes[rank] > 0, codes[rank] == LOST, rank), default=None)

"""Merging over several processes: they meet by torch.distributed, and write one folder together.

What ranks exchange is small and lies on the CPU (counters, norms, Gram matrices, merged adapters),
so that gloo carries it wherever the entries are.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from anabranch.aggregation.ranks import ALONE, LostRankError, Ranks
from anabranch.vectors.new_folder import hidden_beside, new_folder

_MEETING = "ANABRANCH_MEETING"
"""Where ranks started on one machine meet: a ``file://`` address. torchrun has MASTER_ADDR."""

_PATIENCE = timedelta(days=7)
"""One rank may take long over its modules; one that dies is noticed by its connection."""


def environment_of(ranks: Ranks, meeting: Path) -> dict[str, str]:
    """What tells a process that it is one of several ranks on this machine.

    Args:
        ranks: Which one.
        meeting: A folder that all of them see, and nobody else.
    """
    return {
        _MEETING: f"file://{meeting / 'meeting'}",
        # Ranks believe each other, so nobody else may talk to them.
        "GLOO_SOCKET_IFNAME": _loopback(),
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.count),
        "LOCAL_WORLD_SIZE": str(ranks.local_count),
    }


def _loopback() -> str:
    """The interface that only this machine reaches: ``lo``, or ``lo0``."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def started_together(environment: Mapping[str, str]) -> bool:
    """Whether ``environment_of`` did it, and who started the ranks speaks for one that is lost."""
    return _MEETING in environment


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """What torchrun, or ``environment_of``, tells this process; alone where nobody does.

    Raises:
        ValueError: Numbers that cannot be.
    """
    if not started_together(environment) and "MASTER_ADDR" not in environment:
        return ALONE
    keys = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    stated = [environment.get(key, "") for key in keys]
    if not all(value.isdecimal() for value in stated):
        raise ValueError(
            f"{'/'.join(keys)}: are {'/'.join(map(repr, stated))} beside MASTER_ADDR; "
            "start all ranks by torchrun or by --ranks, or unset MASTER_ADDR"
        )
    rank, count, local_count = map(int, stated)
    if not (rank < count and 1 <= local_count <= count):
        raise ValueError(f"{'/'.join(keys)}: {'/'.join(stated)} cannot be; start all by torchrun")
    return Ranks(rank, count, local_count)


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Meet the other ranks, and part from them.

    Args:
        ranks: What ``ranks_of`` found in this process's environment.

    Raises:
        LostRankError: The others are not there.
    """
    if ranks.count == 1:
        yield
        return
    # Whoever started the ranks ends them so; what was begun is then removed.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if torch.cuda.is_available():
        # ``cuda`` without a number is then another GPU on each of this machine's ranks.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        distributed.init_process_group(
            "gloo",
            init_method=os.environ.get(_MEETING, "env://"),
            rank=ranks.rank,
            world_size=ranks.count,
            timeout=_PATIENCE,
        )
    except RuntimeError as error:
        raise LostRankError(f"rank {ranks.rank} met no others ({error})") from error
    try:
        yield
    finally:
        distributed.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def shared_folder(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """``new_folder`` for several ranks: rank 0 makes it, and names it once all are done.

    Args:
        folder: What does not exist yet, or is empty; on a file system that all ranks see.
        ranks: Who writes into it.

    Yields:
        A hidden folder beside it, the same on all of them.

    Raises:
        ValueError: The folder holds files.
        OSError: The disk refuses.
        LostRankError: A rank is gone, and nothing is left behind.
    """
    # All know its name before it is made: any of them may have to remove it.
    partial = ranks.gather(hidden_beside(folder))[0]
    if ranks.rank == 0:
        with new_folder(folder, partial), _shared(partial, ranks):
            ranks.wait()
            yield partial
            ranks.wait()
    else:
        try:
            with _shared(partial, ranks):
                ranks.wait()
                yield partial
                ranks.wait()
        except (LostRankError, SystemExit, KeyboardInterrupt):
            # Rank 0 removes its folder, unless it is rank 0 that died.
            shutil.rmtree(partial, ignore_errors=True)
            raise
    ranks.wait()


@contextmanager
def _shared(partial: Path, ranks: Ranks) -> Iterator[None]:
    """Who finds the folder gone has lost another rank, which failed first."""
    try:
        yield
    except FileNotFoundError as error:
        if ranks.count == 1 or partial.exists():
            raise
        raise ranks.lost() from error

"""Threads in which clients train side by side, and how many are worth having."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from anabranch.client.session import Session
from anabranch.simulation.task import SimulatedTask

T = TypeVar("T")


def at_once(session: Session, clients: int) -> int:
    """How many of so many clients train at once: one per thread of torch, where the task allows.

    Cores with a client each get more done than cores that share one client's small matrices. A GPU
    is one device whichever thread asks.
    """
    task = session.task
    assert isinstance(task, SimulatedTask)
    on_cpu = all(tensor.device.type == "cpu" for tensor in session.model.parameters())
    return min(torch.get_num_threads(), clients) if task.side_by_side and on_cpu else 1


class ClientThreads:
    """Threads for clients, among which torch's are shared out while any client is at work.

    The shares decide how sums are split, so they, and not which thread is first, decide a
    result's last bits. With one thread everything runs in the caller's own.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._all = torch.get_num_threads()
        self._share = max(1, self._all // count)
        self._at_work = 0
        self._pool = None
        if count > 1:
            self._pool = ThreadPoolExecutor(
                count, "client", initializer=torch.set_num_threads, initargs=(self._share,)
            )

    def begin(self, call: Callable[[], T]) -> Callable[[], T]:
        """Have a call made as soon as a thread is free; what is returned waits for its result."""
        if self._pool is None:
            return call
        # Torch keeps a number per thread, MKL one for all: this thread takes the same share.
        torch.set_num_threads(self._share)
        self._at_work += 1
        future = self._pool.submit(call)

        def result() -> T:
            try:
                return future.result()
            finally:
                self._at_work -= 1
                if not self._at_work:
                    torch.set_num_threads(self._all)

        return result

    def __enter__(self) -> ClientThreads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._all)

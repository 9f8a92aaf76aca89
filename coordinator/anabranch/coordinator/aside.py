"""Replies that take long to fetch are fetched aside, so that nobody else waits along.

SuperLink hands a reply out once its head is there, and Flower's ``pull_messages`` then waits for
the bytes: three minutes where the sender's line broke. Who answered meanwhile would wait as long,
and so would the round's deadline.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

PATIENCE_S = 2.0
"""Seconds that a reply is waited for before others are looked at. Most need milliseconds."""
AT_ONCE = 16
"""Most fetched at the same time: each may hold a part of its bytes in memory."""


class Aside:
    """Fetches under way.

    Args:
        fetch: Gets the replies to one message, and may take long; called in a thread.
        patience_s: Seconds that the caller waits for it, once.
    """

    def __init__(
        self, fetch: Callable[[str], Iterable[Message]], patience_s: float = PATIENCE_S
    ) -> None:
        self._fetch, self._patience_s = fetch, patience_s
        self._wanted: dict[str, Future[list[Message]]] = {}
        self._running: set[Future[list[Message]]] = set()

    def pull(self, identifier: str) -> list[Message]:
        """What has come for a message; empty while nothing has, or its bytes are on their way.

        Raises:
            Exception: Whatever the fetch raised.
        """
        patience_s, under_way = 0.0, self._wanted.get(identifier)
        if under_way is None:
            self._running = {one for one in self._running if not one.done()}
            if len(self._running) >= AT_ONCE:
                return []
            patience_s, under_way = self._patience_s, Future()
            self._wanted[identifier] = under_way
            self._running.add(under_way)
            # No pool: the interpreter would wait for its threads before it ends.
            threading.Thread(target=self._run, args=(identifier, under_way), daemon=True).start()
        if not wait([under_way], patience_s).done:
            return []
        del self._wanted[identifier]
        return under_way.result()

    def forget(self, identifier: str) -> None:
        """Nobody wants a message's reply any more."""
        self._wanted.pop(identifier, None)

    def _run(self, identifier: str, under_way: Future[list[Message]]) -> None:
        try:
            under_way.set_result(list(self._fetch(identifier)))
        except BaseException as error:
            under_way.set_exception(error)


def lives(grid: Grid) -> dict[int, str]:
    """What changes about each node when it was gone for a while, or starts anew under its number.

    Empty where Flower does not tell.
    """
    if not reaches_out(grid):
        return {}
    nodes: Iterable[Any] = grid.get_nodes()
    return {int(node.node_id): str(node.last_activated_at) for node in nodes}


def reaches_out(grid: Grid) -> bool:
    """Whether a grid is Flower's connection to a SuperLink, and not one in this process."""
    # Where it is one, its module is loaded; elsewhere that would cost seconds.
    module = sys.modules.get("flwr.superlink.grid.http_grid")
    return module is not None and isinstance(grid, module.HttpGrid)

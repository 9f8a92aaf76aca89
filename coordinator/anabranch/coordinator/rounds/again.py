"""Clients whose order, or reply, was lost on its way: they are asked again once they are there.

Flower tells: of a node that it heard nothing of for a minute, of a reply whose bytes did not all
come, of a node that started anew. What such a node had in hand is lost to the round, and the node
says no word of it. Asked again, one that keeps a ``state`` folder answers with the update that it
made, to the byte.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from flwr.serverapp import Grid

from anabranch.coordinator.roster import Roster

LOOK_S = 3.0
"""Seconds between two looks for who is there again."""
MOST = 3
"""How often a client is asked again in a round: what says that it is gone may be its own reply."""


class Again:
    """Who is gone in a round.

    Args:
        roster: Who is there.
        clock: Monotonic seconds.
    """

    def __init__(self, roster: Roster, clock: Callable[[], float] = time.monotonic) -> None:
        self._roster, self._clock = roster, clock
        self._gone: set[str] = set()
        self._asked: Counter[str] = Counter()
        self._look_at_s = 0.0

    def lose(self, client: str) -> bool:
        """Take a client for gone; False where it was asked again too often for that."""
        if self._asked[client] >= MOST:
            return False
        self._gone.add(client)
        return True

    def found(self, client: str) -> bool:
        """An update of a client came after all; whether it was gone."""
        was = client in self._gone
        self._gone.discard(client)
        return was

    def there(self, grid: Grid) -> dict[int, str]:
        """Nodes of clients that were gone and are there again, with their names."""
        if not self._gone or self._clock() < self._look_at_s:
            return {}
        self._look_at_s = self._clock() + LOOK_S
        self._roster.refresh(grid)
        known = self._roster.nodes().items()
        return {node: name for node, name in known if node >= 0 and name in self._gone}

    def asked(self, clients: Iterable[str]) -> None:
        """These have an order again."""
        for client in clients:
            self._gone.discard(client)
            self._asked[client] += 1

"""Clients that keep no SuperNode: they say that they take part, and upload what they trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator

from anabranch.coordinator.store import Store

EVENT = "joined"
"""The kind of note that says who takes part, or no longer."""


def note_joined(store: Store, client: str, here: bool) -> None:
    """Let a client be asked from the next round on, or no longer."""
    store.note(EVENT, {"client": client, "here": here})


def joined(store: Store) -> list[str]:
    """Who takes part by uploading, in the order of names."""
    last = {row["client"]: row["here"] for row in store.notes(EVENT)}
    return sorted(client for client, here in last.items() if here)


class Arrivals:
    """What a round has of each client that it asked, and updates that another process admitted.

    Args:
        number: The round.
        store: Its rows are the truth.
        every_s: Seconds between two looks.
        clock: Monotonic seconds.

    Attributes:
        uploaded: Clients whose update another process admitted.
    """

    def __init__(
        self,
        number: int,
        store: Store,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._number, self._store = number, store
        self._every_s, self._clock = every_s, clock
        self._open: set[str] = set()
        self._held: set[str] = set()
        self._looked_s = float("-inf")
        self.uploaded: set[str] = set()

    def begin(self, asked: Iterable[str], held: Collection[str]) -> None:
        """The round asks these, and has the updates of those."""
        self._open, self._held = set(asked), set(held)

    def answered(self, client: str) -> None:
        """A client's reply was admitted here."""
        self._open.discard(client)
        self._held.add(client)

    def lost(self, client: str) -> None:
        """A client's reply was refused, or will not come; it may upload still."""
        self._open.discard(client)

    def waits(self) -> bool:
        """Whether something is to come of somebody."""
        return bool(self._open)

    def missing(self, clients: Iterable[str]) -> list[str]:
        """Those of whom nothing came."""
        return [client for client in clients if client in self._open]

    def new(self) -> Iterator[tuple[str, bool]]:
        """Clients whose update was uploaded since the last look, and whether it was waited for."""
        if self._clock() - self._looked_s < self._every_s:
            return
        self._looked_s = self._clock()
        for row in self._store.contributions(self._number):
            if row.client not in self._held:
                expected = row.client in self._open
                self.answered(row.client)
                self.uploaded.add(row.client)
                yield row.client, expected

"""Updates that no merge has counted yet: those that came late, and those of abandoned rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.coordinator.store import Contribution, Store

NOT_CARRIED = "not-carried"
"""The kind of note that tells of a late update which is left out, and why."""


@dataclass(frozen=True)
class Carried:
    """An update of an earlier round that the round under way may count.

    Attributes:
        row: The update.
        staleness: Published rounds since the adapter it was trained from was in service.
    """

    row: Contribution
    staleness: int

    def weight(self, exponent: float) -> float:
        """(1 + staleness)^-exponent, FedBuff's (2106.06639)."""
        return float((1 + self.staleness) ** -exponent)

    @property
    def name(self) -> str:
        """How a report tells it from the client's own update of the round."""
        return late_name(self.row.client, self.row.round)


def late_name(client: str, number: int) -> str:
    """What a merge calls a client's update of an earlier round."""
    return f"{client} (round {number})"


@dataclass(frozen=True)
class Counted:
    """What a round merges.

    Attributes:
        own: The updates made in it, by client.
        late: Those of earlier rounds.
    """

    own: Sequence[Contribution] = ()
    late: Sequence[Carried] = ()

    @property
    def rows(self) -> list[Contribution]:
        """All, in the order in which they are merged."""
        return [*self.own, *(one.row for one in self.late)]

    @property
    def names(self) -> list[str]:
        """What a report calls them."""
        return [*(row.client for row in self.own), *(one.name for one in self.late)]

    def factors(self, exponent: float) -> list[float] | None:
        """How much each counts; None: all alike."""
        if not self.late:
            return None
        return [1.0] * len(self.own) + [one.weight(exponent) for one in self.late]


def carried(store: Store, number: int, max_staleness: int) -> list[Carried]:
    """What round ``number`` may count beside its own updates, at most one update per client.

    A client that contributed to the round itself is left out, and of several of one client the
    newest is taken: one vote each. What a client sent before it was withdrawn counts no more, nor
    what a merge failed with. A failed merge whose fault is not known ages its late updates as a
    published round does, so that none of them is tried for ever.

    Args:
        store: What was admitted, published and counted so far.
        number: The round under way.
        max_staleness: Rounds, published or failed with it, after which an update is too old.
    """
    published = [row.round for row in store.publications()]
    own = {row.client for row in store.contributions(number)}
    counted, gone = _counted(store) | _left_out(store), _withdrawn(store)
    failed = _failed(store)
    newest: dict[str, Carried] = {}
    for row in store.contributions():
        staleness = sum(row.round <= other < number for other in published)
        taken = (row.client, row.round) in counted or row.client in own
        taken = taken or row.round <= gone.get(row.client, 0)
        tried = failed[(row.client, row.round)]
        if row.round < number and not taken and staleness + tried <= max_staleness:
            newest[row.client] = Carried(row, staleness)
    return [newest[client] for client in sorted(newest)]


def told(rows: Sequence[Carried]) -> dict[str, int]:
    """Whose updates of which rounds, for the record of the round that counts them."""
    return {one.row.client: one.row.round for one in rows}


def _withdrawn(store: Store) -> dict[str, int]:
    """The round in whose place each client was withdrawn from the run."""
    rows = [row for row in store.notes("round") if row["status"] == "withdrawn"]
    return {client: row["round"] for row in rows for client in row["without"]}


def _left_out(store: Store) -> set[tuple[str, int]]:
    """Client and round of every update that was found to be what a merge failed with."""
    rows = (row for row in store.notes(NOT_CARRIED) if row.get("final"))
    return {(row["client"], row["from"]) for row in rows}


def _failed(store: Store) -> Counter[tuple[str, int]]:
    """How many merges failed that were to count a late update."""
    rows = (row for row in store.notes("round") if row.get("failed"))
    return Counter(pair for row in rows for pair in row.get("carried", {}).items())


def _counted(store: Store) -> set[tuple[str, int]]:
    """Client and round of every update that a published adapter holds."""
    found: set[tuple[str, int]] = set()
    for publication in store.publications():
        found.update((name, publication.round) for name in publication.report.get("names", ()))
    for row in store.notes("round"):
        if row["status"] == "published":
            found.update(row.get("carried", {}).items())
    return found

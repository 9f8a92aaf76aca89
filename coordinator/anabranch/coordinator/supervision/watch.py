"""What happened in a federation since the last look, read from its store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.standing import Standing, standing
from anabranch.coordinator.store import Store


@dataclass(frozen=True)
class Happened:
    """A change of state.

    Attributes:
        event: Its kind, for machines.
        told: In words.
        about: Fields of its line in a log: ``round``, ``client`` and the like.
    """

    event: str
    told: str
    about: dict[str, Any]


class Watch:
    """Looks at a store again and again.

    Args:
        config: The federation.
        store: Its store.

    Attributes:
        now: Where it stood at the last look.
    """

    def __init__(self, config: FederationConfig, store: Store) -> None:
        self._config, self._store = config, store
        self.now = standing(config, store)

    @property
    def gained(self) -> tuple[int, int]:
        """Rounds that are over, and updates admitted to the one under way."""
        return self.now.done, len(self.now.admitted)

    @property
    def complete(self) -> bool:
        """Whether every round is over."""
        return self.now.done >= self._config.rounds

    def look(self) -> list[Happened]:
        """Look again; returns what is new, in its order."""
        before, self.now = self.now, standing(self._config, self._store)
        return list(_changes(before, self.now))


def _changes(before: Standing, now: Standing) -> Iterator[Happened]:
    known = set(before.admitted) if now.round == before.round else set()
    if now.done != before.done:
        gained = now.published - before.published
        word = "published" if gained else "abandoned"
        why = f": {now.last}" if now.last and not gained else ""
        yield Happened(word, f"round {now.done} is {word}{why}", {"round": now.done})
    if now.round is not None:
        if (now.round, now.state) != (before.round, before.state):
            told = f"round {now.round} is {now.state}, {len(now.admitted)} updates are held"
            yield Happened(f"round-{now.state}", told, {"round": now.round})
        for client in now.admitted:
            if client not in known:
                told = f"round {now.round}: {client} is admitted"
                yield Happened("admitted", told, {"round": now.round, "client": client})
        if now.refused != before.refused and now.refused:
            codes = ", ".join(f"{count} {code}" for code, count in sorted(now.refused.items()))
            told = f"round {now.round}: refused so far: {codes}"
            yield Happened("refused", told, {"round": now.round})
    if now.want != before.want:
        yield Happened("asked", f"asked to {now.want}", {})

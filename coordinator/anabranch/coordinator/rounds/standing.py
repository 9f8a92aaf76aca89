"""Where a federation stands, read from its store alone. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.rounds.control import Want, latest
from anabranch.coordinator.rounds.service import Service, service
from anabranch.coordinator.store import Store


@dataclass(frozen=True)
class Standing:
    """A federation at one moment.

    Attributes:
        federation: Its name.
        run: Its run.
        want: What the operator asks.
        rounds: How many it plans.
        done: The last round that is over.
        published: Rounds that were published.
        abandoned: Rounds that were abandoned.
        round: The round under way; None between rounds.
        state: Where that stands: ``collecting``, ``merging`` or ``gating``.
        asked: Clients it asked, also before a restart.
        admitted: Those whose update it holds.
        refused: Refusals in it, by code.
        adapter_hash: The adapter in service; None before the first.
        last: Why the last round was abandoned, or the run stopped; empty where neither is so.
        over: Whether no further round begins, unless an operator asks for something else.
        service: Whether it was started by way of the API, and on which port.
        running: Whether a coordinator keeps it at work; None where who asks cannot tell.
    """

    federation: str
    run: str
    want: str
    rounds: int
    done: int
    published: int
    abandoned: int
    round: int | None
    state: str | None
    asked: tuple[str, ...]
    admitted: tuple[str, ...]
    refused: dict[str, int]
    adapter_hash: str | None
    last: str
    over: bool = False
    service: Service | None = None
    running: bool | None = None


def standing(config: FederationConfig, store: Store) -> Standing:
    """Where a federation stands."""
    over, publication = store.notes("round"), store.latest()
    done = max([row["round"] for row in over] + [publication.round if publication else 0])
    planned = [row for row in store.notes("planned") if row["round"] > done]
    number = planned[-1]["round"] if planned else None
    states = [row["state"] for row in store.notes("state") if row["round"] == number]
    refused: dict[str, int] = {}
    for row in store.refusals(number) if number is not None else ():
        refused[row.code] = refused.get(row.code, 0) + 1
    reasons = [row["reason"] for row in over[-1:] if row["status"] == "abandoned"]
    want = latest(store)
    stops = [row for row in store.notes("stopped")[-1:] if row["round"] == done + 1]
    reasons += [row["reason"] for row in stops]
    # What stopped the run holds as long as nothing else is asked: a new run asks to run again.
    stopped = [row for row in stops if row.get("want", Want.RUN) == want]
    return Standing(
        federation=config.name,
        run=config.run,
        want=want.value,
        rounds=config.rounds,
        done=done,
        published=sum(row["status"] == "published" for row in over),
        abandoned=sum(row["status"] == "abandoned" for row in over),
        round=number,
        state=(states[-1] if states else "planned") if number is not None else None,
        asked=tuple(sorted({name for row in planned for name in row["asked"]})),
        admitted=tuple(row.client for row in store.contributions(number)) if number else (),
        refused=refused,
        adapter_hash=publication.adapter_hash if publication else None,
        last=reasons[-1] if reasons else "",
        over=done >= config.rounds or (number is None and bool(stopped)),
        service=service(store),
    )

"""Where every federation of a database stands, in four queries however many there are.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    Engine,
    Integer,
    ScalarSelect,
    Select,
    Table,
    cast,
    func,
    literal,
    select,
)

from anabranch.coordinator.rounds import control
from anabranch.coordinator.store.schema import (
    contributions,
    federations,
    notes,
    publications,
    receipts,
    refusals,
)

NOT_MERGED = ("rollback", "withdrawal")
"""Kinds of receipts of publications that no round made."""


@dataclass(frozen=True)
class Overview:
    """One federation's run at one moment; ``standing.Standing`` says more of one.

    Attributes:
        federation: Its name.
        run: Its run.
        want: What the operator asks.
        done: The last round that is over.
        published: Rounds that were published.
        abandoned: Rounds that were abandoned.
        round: The round under way; None between rounds.
        state: Where that stands.
        asked: How many clients it asked.
        admitted: How many updates it holds.
        refused: Replies it refused.
        adapter_hash: The adapter in service; None before the first.
        last: Why the last round was abandoned, or the run stopped; empty where neither is so.
    """

    federation: str
    run: str
    want: str
    done: int
    published: int
    abandoned: int
    round: int | None
    state: str | None
    asked: int
    admitted: int
    refused: int
    adapter_hash: str | None
    last: str


def overview(engine: Engine) -> list[Overview]:
    """Every federation's run, sorted by name; runs of one in the order they began."""
    with engine.connect() as connection:
        heads = [dict(row._mapping) for row in connection.execute(_heads())]
        planned = _planned(connection, {head["id"]: _done(head) for head in heads})
        rounds = {key: rows[-1]["round"] for key, rows in planned.items()}
        admitted = _counted(connection, contributions, rounds)
        refused = _counted(connection, refusals, rounds)
    found = [
        _one(head, planned.get(key := head["id"], []), admitted.get(key, 0), refused.get(key, 0))
        for head in heads
    ]
    # Sorted here: databases sort text each by its own rules.
    return sorted(found, key=lambda one: one.federation)


def _heads() -> Select[Any]:
    """A row per federation of what one step along an index finds."""
    here = federations.c.id
    ended = (notes.c.federation == here) & (notes.c.event == "round")
    published = publications.c.federation == here
    newest = select(publications).where(published).order_by(publications.c.round.desc()).limit(1)
    others = select(func.count(receipts.c.round.distinct())).where(
        receipts.c.federation == here, receipts.c.kind.in_(NOT_MERGED)
    )
    return select(
        federations,
        _last("round").label("over"),
        _last("state").label("state"),
        _last("stopped").label("stopped"),
        _last(control.EVENT).label("control"),
        _number(select(func.count()).select_from(notes).where(ended)).label("ended"),
        _number(select(func.count()).select_from(publications).where(published)).label("out"),
        _number(others).label("others"),
        newest.with_only_columns(publications.c.round).scalar_subquery().label("newest"),
        newest.with_only_columns(publications.c.adapter_hash).scalar_subquery().label("serves"),
    ).order_by(federations.c.id)


def _last(event: str) -> ScalarSelect[Any]:
    """The newest note of a kind."""
    return (
        select(notes.c.facts)
        .where(notes.c.federation == federations.c.id, notes.c.event == event)
        .order_by(notes.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )


def _number(query: Select[Any]) -> ScalarSelect[Any]:
    return query.scalar_subquery()


def _done(head: Mapping[str, Any]) -> int:
    return max(int((head["over"] or {}).get("round", 0)), int(head["newest"] or 0))


def _planned(connection: Connection, done: Mapping[int, int]) -> dict[int, list[dict[str, Any]]]:
    """The plans of each federation's round under way, oldest first."""
    over = notes.alias()
    last = (
        select(func.coalesce(func.max(over.c.id), 0))
        .where(over.c.federation == federations.c.id, over.c.event == "round")
        .correlate(federations)
        .scalar_subquery()
    )
    own = (notes.c.federation == federations.c.id) & (notes.c.event == "planned")
    query = (
        select(federations.c.id, notes.c.facts)
        .select_from(federations)
        # Of an inner join SQLite reads the notes of all federations first.
        .outerjoin(notes, own & (notes.c.id > last))
        .order_by(federations.c.id, notes.c.id)
    )
    found: dict[int, list[dict[str, Any]]] = {}
    for key, facts in connection.execute(query):
        if facts is not None and facts["round"] > done[key]:
            found.setdefault(key, []).append(facts)
    return found


def _counted(connection: Connection, table: Table, rounds: Mapping[int, int]) -> dict[int, int]:
    """How many rows each federation has of its round under way."""
    # Of `(federation, round) IN …` SQLite reads the index whole, with all rounds there ever were;
    # and a statement with a parameter for each federation is costly to write.
    each = func.json_each if connection.dialect.name == "sqlite" else func.json_each_text
    here = each(literal(dict(rounds), JSON)).table_valued("key", "value").alias("here")
    key, number = (cast(one, Integer) for one in (here.c.key, here.c.value))
    own = (table.c.federation == key) & (table.c.round == number)
    count = _number(select(func.count()).select_from(table).where(own))
    return {row[0]: row[1] for row in connection.execute(select(key, count))}


def _one(
    head: Mapping[str, Any], planned: Sequence[Mapping[str, Any]], admitted: int, refused: int
) -> Overview:
    over, stopped, done = head["over"] or {}, head["stopped"] or {}, _done(head)
    number = planned[-1]["round"] if planned else None
    state = head["state"] or {}
    last = over.get("reason", "") if over.get("status") == "abandoned" else ""
    if stopped.get("round") == done + 1:
        last = stopped["reason"]
    made = head["out"] - head["others"]
    return Overview(
        federation=head["name"],
        run=head["run"],
        want=(head["control"] or {"want": control.Want.RUN.value})["want"],
        done=done,
        published=made,
        # Every publication has a note of its own.
        abandoned=head["ended"] - head["out"],
        round=number,
        state=(state["state"] if state.get("round") == number else "planned") if planned else None,
        asked=len({name for row in planned for name in row["asked"]}),
        admitted=admitted,
        refused=refused,
        adapter_hash=head["serves"],
        last=last,
    )

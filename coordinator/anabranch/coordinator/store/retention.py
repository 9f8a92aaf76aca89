"""What a store lets go of: rows of artifacts first, their bytes afterwards.

Killed in between, bytes are left that no row holds; the next sweep takes them.
"""

from __future__ import annotations

from sqlalchemy import Connection, Engine, delete, func, select, union

from anabranch.coordinator.store.artifacts import DIGEST, PARTIAL, Artifacts
from anabranch.coordinator.store.schema import artifacts, contributions, publications, tags

GRACE_S = 3600.0
"""Bytes no row holds may be on their way to one for so long."""


def let_go(connection: Connection, federation: int, keep_rounds: int) -> None:
    """Hold no more what only rounds before the last ones name.

    The adapter in service stays, however old, and what a tag stands for; so does what the last
    rounds started from.
    """
    newest = max(
        connection.scalar(select(func.max(table.c.round)).where(table.c.federation == federation))
        or 0
        for table in (contributions, publications)
    )
    in_service = (
        select(func.max(publications.c.round))
        .where(publications.c.federation == federation)
        .scalar_subquery()
    )
    tagged = select(tags.c.round).where(tags.c.federation == federation)
    first = newest - keep_rounds + 1
    named = union(
        select(contributions.c.digest).where(
            contributions.c.federation == federation, contributions.c.round >= first
        ),
        select(publications.c.digest).where(
            publications.c.federation == federation,
            (publications.c.round >= first - 1)
            | (publications.c.round == in_service)
            | publications.c.round.in_(tagged),
        ),
    )
    connection.execute(
        delete(artifacts).where(
            artifacts.c.federation == federation, artifacts.c.digest.not_in(named)
        )
    )


def sweep(engine: Engine, kept: Artifacts, grace_s: float = GRACE_S) -> int:
    """Delete the bytes no row of any federation holds; returns how many artifacts.

    Args:
        engine: The database.
        kept: Its artifacts.
        grace_s: Age below which they stay.
    """
    found = [name for name, age_s in kept.names() if age_s >= grace_s]
    with engine.connect() as connection:
        held = set(connection.scalars(select(artifacts.c.digest)))
    count = 0
    for name in found:
        if name not in held and (DIGEST.fullmatch(name) or name.endswith(PARTIAL)):
            kept.delete(name)
            count += 1
    return count

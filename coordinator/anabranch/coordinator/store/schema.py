"""The tables, one set for every database. ``migrations/`` brings an older database to them."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class Facts(TypeDecorator[Any]):
    """A JSON value as text: what a merge reports may hold NaN, which PostgreSQL's JSON refuses."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:  # noqa: D102
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: D102
        # A query finds none where there is no row.
        return None if value is None else json.loads(value)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _federation(**options: Any) -> Column[int]:
    return Column("federation", ForeignKey("federations.id"), nullable=False, **options)


federations = Table(
    "federations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(200), nullable=False),
    Column("run", String(200), nullable=False),
    UniqueConstraint("name", "run"),
)

# What is kept, for quotas and retention: a row is there as long as its bytes have to be.
artifacts = Table(
    "artifacts",
    metadata,
    _federation(primary_key=True),
    Column("digest", String(64), primary_key=True, index=True),
    Column("size_bytes", BigInteger, nullable=False),
)

contributions = Table(
    "contributions",
    metadata,
    _federation(primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("client", String(200), primary_key=True),
    Column("time", Float, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("nonce", Text, nullable=False),
    Column("metrics", Facts, nullable=False),
)

refusals = Table(
    "refusals",
    metadata,
    Column("id", Integer, primary_key=True),
    _federation(),
    Column("time", Float, nullable=False),
    Column("round", Integer, nullable=False),
    Column("client", String(200), nullable=False),
    Column("code", String(100), nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "federation", "round"),
)

publications = Table(
    "publications",
    metadata,
    _federation(primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("adapter_hash", String(64), nullable=False),
    Column("report", Facts, nullable=False),
)

# ``number`` is the place in the chain: two processes cannot both write the one that is next.
receipts = Table(
    "receipts",
    metadata,
    _federation(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    Column("round", Integer, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("content", Text, nullable=False),
)

tags = Table(
    "tags",
    metadata,
    _federation(primary_key=True),
    Column("name", String(100), primary_key=True),
    Column("time", Float, nullable=False),
    Column("round", Integer, nullable=False),
)

notes = Table(
    "notes",
    metadata,
    Column("id", Integer, primary_key=True),
    _federation(),
    Column("time", Float, nullable=False),
    Column("event", String(100), nullable=False),
    Column("facts", Facts, nullable=False),
    # The last note of a kind is one step away.
    Index(None, "federation", "event", "id"),
)

OF_A_FEDERATION = (artifacts, contributions, refusals, publications, receipts, tags, notes)
"""The tables that hold a federation's rows."""

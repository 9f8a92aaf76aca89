"""Federations, their artifacts, contributions, refusals, publications and notes."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None


def _federation(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("federation", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.id"], name=f"fk_{table}_federation"),
    ]


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "federations",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("run", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_federations"),
        sa.UniqueConstraint("name", "run", name="uq_federations_name_run"),
    )
    op.create_table(
        "artifacts",
        *_federation("artifacts"),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("federation", "digest", name="pk_artifacts"),
    )
    op.create_index("ix_artifacts_digest", "artifacts", ["digest"])
    op.create_table(
        "contributions",
        *_federation("contributions"),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("client", sa.String(200), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("nonce", sa.Text, nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("federation", "round", "client", name="pk_contributions"),
    )
    op.create_table(
        "refusals",
        sa.Column("id", sa.Integer, nullable=False),
        *_federation("refusals"),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("client", sa.String(200), nullable=False),
        sa.Column("code", sa.String(100), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_refusals"),
    )
    op.create_index("ix_refusals_federation", "refusals", ["federation"])
    op.create_table(
        "publications",
        *_federation("publications"),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("adapter_hash", sa.String(64), nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("federation", "round", name="pk_publications"),
    )
    op.create_table(
        "notes",
        sa.Column("id", sa.Integer, nullable=False),
        *_federation("notes"),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("event", sa.String(100), nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_notes"),
    )
    op.create_index("ix_notes_federation", "notes", ["federation"])


def downgrade() -> None:
    """Drop every table."""
    for table in ("notes", "publications", "refusals", "contributions", "artifacts", "federations"):
        op.drop_table(table)

"""Receipts, and tags of what was published."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def _federation(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("federation", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["federation"], ["federations.id"], name=f"fk_{table}_federation"),
    ]


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "receipts",
        *_federation("receipts"),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("federation", "number", name="pk_receipts"),
    )
    op.create_table(
        "tags",
        *_federation("tags"),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("federation", "name", name="pk_tags"),
    )


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("tags")
    op.drop_table("receipts")

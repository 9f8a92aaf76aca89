"""Indexes by which the standing of every federation is read in a few steps each."""

from alembic import op

revision, down_revision = "0003", "0002"

_OLD = {"notes": ["federation"], "refusals": ["federation"]}
_NEW = {"notes": ["federation", "event", "id"], "refusals": ["federation", "round"]}


def upgrade() -> None:
    """By kind and place as well, not by federation alone."""
    _exchange(_OLD, _NEW)


def downgrade() -> None:
    """By federation alone."""
    _exchange(_NEW, _OLD)


def _exchange(old: dict[str, list[str]], new: dict[str, list[str]]) -> None:
    for table, columns in old.items():
        op.drop_index(_name(table, columns), table)
        op.create_index(_name(table, new[table]), table, new[table])


def _name(table: str, columns: list[str]) -> str:
    return f"ix_{table}_{'_'.join(columns)}"

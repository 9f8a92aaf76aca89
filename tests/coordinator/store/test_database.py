from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from anabranch.coordinator.store import Contribution, Store
from anabranch.coordinator.store.artifacts import FolderArtifacts
from anabranch.coordinator.store.database import connect, create, migrate, place
from anabranch.coordinator.store.schema import metadata
from anabranch.coordinator.store.sql import SqlStore


def test_migrations_go_up_and_down_and_make_the_schema(database_url: str) -> None:
    engine = create(database_url)
    for _ in range(2):
        migrate(engine)
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
            assert set(inspect(connection).get_table_names()) == {
                "alembic_version", *metadata.tables,
            }  # fmt: skip
        migrate(engine, "base")
        with engine.connect() as connection:
            assert inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_a_database_of_a_later_release_is_left_alone(database_url: str) -> None:
    engine = connect(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ValueError, match="revision 9999, which this release does not know"):
        connect(database_url)
    engine.dispose()


def test_many_may_open_a_new_database_at_once(database_url: str, tmp_path: Path) -> None:
    errors: list[Exception] = []
    counted: list[bool] = []

    def work() -> None:
        try:
            engine = connect(database_url)
            kept = FolderArtifacts(tmp_path)
            store = SqlStore(engine, kept, federation="f", run="r")
            row = Contribution(round=1, client="a", digest="d", size_bytes=1)
            counted.append(store.admit(row))
            engine.dispose()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(counted) == [False] * 5 + [True]


def test_sqlite_writes_ahead_and_flushes(tmp_path: Path) -> None:
    for durable, level in ((True, 2), (False, 0)):
        engine = connect(f"sqlite:///{tmp_path}/{durable}.db", durable=durable)
        with engine.connect() as connection:
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
            assert connection.scalar(text("PRAGMA synchronous")) == level
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1
        engine.dispose()


def test_runs_and_federations_share_a_database_and_not_their_rounds(
    database_url: str, open_one: Callable[..., Store]
) -> None:
    stores = [
        open_one(database_url, federation=name, run=run)
        for name, run in (("f", "1"), ("f", "2"), ("g", "1"))
    ]
    for store in stores:
        assert store.admit(Contribution(round=1, client="a", digest="d", size_bytes=1))
        store.note("planned", {"round": 1})
    for store in stores:
        assert len(store.contributions()) == len(store.notes("planned")) == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://u:secret@127.0.0.1:1/f", r"postgresql://u:\*\*\*@127.0.0.1:1/f: cannot be"),
        ("postgresql://host:port/f", "store.url: .* is no address of a database"),
    ],
)
def test_a_database_that_cannot_be_had_is_named_without_its_password(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        connect(url)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.db").write_text("not a database at all" * 100)
    with pytest.raises(ValueError, match=r"odd.db: cannot be opened: file is not a database"):
        connect(f"sqlite:///{tmp_path}/odd.db")
    assert place(create("postgresql://u:p@h/d")) == "postgresql://u:***@h/d"

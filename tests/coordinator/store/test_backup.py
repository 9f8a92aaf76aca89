from __future__ import annotations

import io
import itertools
import json
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.coordinator.federation import (
    START_FOLDER,
    FederationConfig,
    load_federation,
    write_federation,
)
from anabranch.coordinator.registry import KEYS_FOLDER, REVOKED
from anabranch.coordinator.store import (
    Contribution,
    Publication,
    Refusal,
    Store,
    StoreConfig,
    open_store,
)
from anabranch.coordinator.store.backup import ROWS, backup, restore
from anabranch.wire.receipt import Receipt, encode_receipt, receipt_hash

CONTENT = "what a start holds"


def make_federation(folder: Path, url: str, **changes: str) -> None:
    store = StoreConfig(url=url, **changes)
    write_federation(FederationConfig(name="f", run="r", store=store), folder)
    (folder / START_FOLDER).mkdir()
    (folder / START_FOLDER / "adapter_config.json").write_text(CONTENT)
    (folder / KEYS_FOLDER).mkdir()
    for name in (REVOKED, "coordinator.key"):
        (folder / KEYS_FOLDER / name).write_text(name)


def opened(folder: Path) -> Store:
    config = load_federation(folder)
    return open_store(config.store, folder, federation=config.name, run=config.run, durable=False)


def admit(store: Store, number: int, client: str) -> bool:
    data = f"{number} {client}".encode()
    row = Contribution(round=number, client=client, digest=store.put(data), size_bytes=len(data))
    return store.admit(row)


def run_rounds(store: Store) -> None:
    for number in (1, 2):
        for client in ("b", "a"):
            assert admit(store, number, client)
        store.refuse(Refusal(round=number, client="c", code="norm", reason="too large"))
        row = Publication(round=number, digest=store.put(b"%d" % number), adapter_hash="h")
        last = store.last_receipt()
        receipt = Receipt(
            kind="merge", federation="f", run="r", round=number, time_s=1.5, software="ö",
            previous=receipt_hash(last) if last else None, base_hash="ab" * 32,
            start_hash="cd" * 32,
        )  # fmt: skip
        store.publish(row, {"round": number}, [encode_receipt(receipt, None)])
    store.tag("champion", 1)


def everything(store: Store) -> list[object]:
    return [
        store.contributions(), store.refusals(), store.publications(), store.notes("round"),
        store.receipts(), store.tags(),
        [store.get(row.digest) for row in (*store.contributions(), *store.publications())],
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["the same kind", "the other kind"])
def test_a_backup_is_restored_whole_into_either_database(
    database_url: str, postgres_url: str, tmp_path: Path, to: str
) -> None:
    make_federation(tmp_path / "f", database_url)
    before = opened(tmp_path / "f")
    run_rounds(before)
    done = backup(tmp_path / "f", tmp_path / "f.tar")
    assert (done.artifacts, done.rows["contributions"]) == (6, 4)
    same = to == "the same kind"
    to_sqlite = database_url.startswith("sqlite") == same
    url = f"sqlite:///{tmp_path}/restored.db" if to_sqlite else postgres_url
    if not to_sqlite and same:
        with pytest.raises(ValueError, match="holds run r of f already; restore into another"):
            restore(tmp_path / "f.tar", tmp_path / "again")
        assert not (tmp_path / "again").exists()
        before.close()
        return
    assert restore(tmp_path / "f.tar", tmp_path / "again", url=url) == done
    after = opened(tmp_path / "again")
    assert everything(after) == everything(before)
    assert not admit(after, 2, "a")
    assert admit(after, 3, "a")
    assert (tmp_path / "again" / START_FOLDER / "adapter_config.json").read_text() == CONTENT
    # The list of revoked keys comes back, the coordinator's secret was never in it.
    assert [path.name for path in (tmp_path / "again" / KEYS_FOLDER).iterdir()] == [REVOKED]
    after.close()
    before.close()


def test_a_backup_of_a_live_coordinator_is_of_one_moment(database_url: str, tmp_path: Path) -> None:
    make_federation(tmp_path / "f", database_url)
    stop, admitted = threading.Event(), itertools.count(1)

    def work() -> None:
        store = opened(tmp_path / "f")
        for number in admitted:
            if stop.is_set():
                break
            assert admit(store, number, "a")
            row = Publication(round=number, digest=store.put(b"%d" % number), adapter_hash="h")
            store.publish(row, {"round": number})
            time.sleep(0.01)  # or a slow backup has more and more to restore
        store.close()

    writer = threading.Thread(target=work)
    writer.start()
    sizes = []
    try:
        for number in range(3):
            file = tmp_path / f"{number}.tar"
            backup(tmp_path / "f", file)
            url = f"sqlite:///{tmp_path}/{number}.db"
            restore(file, tmp_path / str(number), url=url)
            store = opened(tmp_path / str(number))
            rounds = [row.round for row in store.publications()]
            assert rounds == list(range(1, len(rounds) + 1))
            assert [row["round"] for row in store.notes("round")] == rounds
            # The writer admits, then publishes: at most one contribution is ahead.
            assert len(store.contributions()) - len(rounds) in (0, 1)
            assert len(everything(store)[-1]) == len(store.contributions()) + len(rounds)
            sizes.append(len(rounds))
            store.close()
    finally:
        stop.set()
        writer.join()
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


def test_a_backup_of_a_release_without_receipts_is_restored(tmp_path: Path) -> None:
    make_federation(tmp_path / "f", "sqlite:///rounds.db")
    before = opened(tmp_path / "f")
    run_rounds(before)
    backup(tmp_path / "f", tmp_path / "f.tar")
    with tarfile.open(tmp_path / "f.tar") as tar, tarfile.open(tmp_path / "old.tar", "w") as old:
        for member in tar:
            stream = tar.extractfile(member)
            data = stream.read() if stream else b""
            if member.name == ROWS:
                content = json.loads(data)
                for table in ("receipts", "tags"):
                    del content["tables"][table]
                data = json.dumps(content).encode()
                member.size = len(data)
            old.addfile(member, io.BytesIO(data) if stream else None)
    restore(tmp_path / "old.tar", tmp_path / "again")
    after = opened(tmp_path / "again")
    assert (after.receipts(), after.tags()) == ([], {})
    assert after.publications() == before.publications()
    after.close()
    before.close()


def test_artifacts_move_to_a_bucket(bucket: str, tmp_path: Path) -> None:
    make_federation(tmp_path / "f", "sqlite:///rounds.db")
    before = opened(tmp_path / "f")
    run_rounds(before)
    backup(tmp_path / "f", tmp_path / "f.tar")
    place = f"s3://{bucket}/f"
    restore(tmp_path / "f.tar", tmp_path / "again", artifacts_place=place)
    after = opened(tmp_path / "again")
    assert everything(after) == everything(before)
    assert not (tmp_path / "again" / "artifacts").exists()
    after.close()
    before.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "is damaged or no backup"),
        (lambda data: b"", "is damaged or no backup"),
        (lambda data: b"text" * 1000, "is damaged or no backup"),
        (
            lambda data: data.replace(b"1 a\0", b"1 x\0"),
            "artifact [0-9a-f]{64} of the backup is damaged",
        ),
    ],
)
def test_a_damaged_backup_leaves_nothing(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    make_federation(tmp_path / "f", "sqlite:///rounds.db")
    store = opened(tmp_path / "f")
    run_rounds(store)
    store.close()
    file = tmp_path / "f.tar"
    backup(tmp_path / "f", file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=reason):
        restore(file, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "f.tar"]


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    make_federation(tmp_path / "f", "journal")
    with pytest.raises(ValueError, match="f: keeps a journal; copy its folder"):
        backup(tmp_path / "f", tmp_path / "f.tar")
    (tmp_path / "f.tar").touch()
    with pytest.raises(ValueError, match=r"f.tar: exists already"):
        backup(tmp_path / "f", tmp_path / "f.tar")
    with pytest.raises(ValueError, match="f: exists already"):
        restore(tmp_path / "f.tar", tmp_path / "f")

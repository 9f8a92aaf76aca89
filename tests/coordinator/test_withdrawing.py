"""Withdrawal beside a federation in which the client never was, and beside merges made by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from anabranch.aggregation import Recipe, merge
from anabranch.coordinator.federation import START_FOLDER, load_federation
from anabranch.coordinator.lineage import chosen, published, read_published, roll_back
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.verification import Verifier
from anabranch.coordinator.withdrawing import withdraw
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire import decode_adapter, decode_update
from anabranch.wire.receipt import check_chain

Run = Callable[..., Path]


def opened(folder: Path) -> Store:
    config = load_federation(folder)
    return open_store(config.store, folder, federation=config.name, run=config.run, durable=False)


def outcomes(folder: Path, store: Store) -> list[str]:
    verifier = Verifier(store, load_federation(folder), read_adapter(folder / START_FOLDER))
    return [verifier.verify(data).outcome for data in store.receipts()]


def changed(store: Store, digest: str, start: Adapter) -> Adapter:
    """A start with an update added, from its bytes."""
    layout = {name: tuple(tensor.shape) for name, tensor in start.tensors().items()}
    _, changes = decode_update(store.get(digest), layout)
    return start.with_tensors(
        {name: tensor + changes[name] for name, tensor in start.tensors().items()}
    )


def test_one_round_is_that_of_a_federation_without_the_client(
    run_federation: Run, tmp_path: Path
) -> None:
    folder = run_federation(tmp_path / "f", rounds=1, recipe={"method": "ties"})
    # Its garbage keeps the client out, as if it had never been there.
    never = run_federation(tmp_path / "g", [(1, 11)], rounds=1, recipe={"method": "ties"})
    template = read_adapter(folder / START_FOLDER)
    with closing(opened(folder)) as store, closing(opened(never)) as other:
        done, rounds = withdraw(store, load_federation(folder), template, ["client-0001"])
        assert (done.round, rounds) == (2, [1])
        assert done.adapter_hash == other.publications()[0].adapter_hash
        latest = store.latest()
        assert latest is not None
        assert latest.adapter_hash == done.adapter_hash
        assert outcomes(folder, store) == ["true", "true"]
        (_, receipt) = check_chain(store.receipts(), None)
        assert (receipt.kind, receipt.redone, receipt.without) == (
            "withdrawal", 1, ("client-0001",),
        )  # fmt: skip
        assert [one.client for one in receipt.inputs] == ["client-0000", "client-0002"]
        assert "Not undone is what others trained on top" in receipt.reason


def test_every_merge_since_is_what_the_others_updates_make_by_hand(
    run_federation: Run, tmp_path: Path
) -> None:
    """The client lied in round 1, so it is in rounds 2 and 3 alone."""
    folder = run_federation(tmp_path / "f", [(1, 12)])
    config, template = load_federation(folder), read_adapter(folder / START_FOLDER)
    seeded = seeded_start(template, config.seed)
    with closing(opened(folder)) as store:
        first = decode_adapter(store.get(store.publications()[0].digest), seeded, "both")
        done, rounds = withdraw(store, config, template, ["client-0002"])
        assert (done.round, rounds) == (4, [2, 3])
        start = first
        for number in (2, 3):
            rows = [row for row in store.contributions(number) if row.client != "client-0002"]
            ends = [changed(store, row.digest, start) for row in rows]
            names = [row.client for row in rows]
            start = merge(ends, Recipe(method="mean"), start=start, names=names).adapter
        assert done.adapter_hash == start.hash()
        assert outcomes(folder, store) == ["true"] * 5
    # The next round starts from it, and stands in one chain with all of it.
    run_federation(folder, rounds=5)
    with closing(opened(folder)) as store:
        chain = check_chain(store.receipts(), None)
        assert [one.kind for one in chain] == ["merge"] * 3 + ["withdrawal"] * 2 + ["merge"]
        assert chain[-1].start_hash == done.adapter_hash
        # A second one leaves the first one's client out of what came before as well.
        done, rounds = withdraw(store, config, template, ["client-0000"])
        assert rounds == [1, 2, 3, 5]
        assert done.adapter_hash == seeded.hash()  # one client is below the quorum
        assert outcomes(folder, store)[-1] == "true"
        last = check_chain(store.receipts(), None)[-1]
        assert last.without == ("client-0000", "client-0002")


def test_too_few_left_make_no_merge(run_federation: Run, tmp_path: Path) -> None:
    folder = run_federation(tmp_path / "f", rounds=2, quorum=3)
    config, template = load_federation(folder), read_adapter(folder / START_FOLDER)
    with closing(opened(folder)) as store:
        done, rounds = withdraw(store, config, template, ["client-0001"])
        assert rounds == [1, 2]
        assert done.adapter_hash == seeded_start(template, config.seed).hash()
        row = chosen(published(store), "latest")
        assert read_published(store, config, template, row.publication).hash() == done.adapter_hash
        assert outcomes(folder, store) == ["true"] * 4


def test_a_rollback_and_a_withdrawal_know_of_each_other(
    run_federation: Run, tmp_path: Path
) -> None:
    folder = run_federation(tmp_path / "f", [(1, 12)], rounds=3)
    config, template = load_federation(folder), read_adapter(folder / START_FOLDER)
    with closing(opened(folder)) as store:
        roll_back(store, config, template, chosen(published(store), "1"))
        with pytest.raises(ValueError, match="in service was made without client-0002"):
            withdraw(store, config, template, ["client-0002"])
        roll_back(store, config, template, chosen(published(store), "2"))
        done, rounds = withdraw(store, config, template, ["client-0002"])
        assert (done.round, rounds) == (6, [2, 3])
        chain = check_chain(store.receipts(), None)
        assert [one.redone for one in chain[-2:]] == [3, 2]
        assert chain[-1].output is not None
        assert chain[-1].output.adapter_hash == done.adapter_hash
        assert outcomes(folder, store) == ["true"] * 7
        with pytest.raises(ValueError, match="before client-0002 withdrew; go back to round 6"):
            roll_back(store, config, template, chosen(published(store), "3"))


def test_who_cannot_be_withdrawn_is_named(run_federation: Run, tmp_path: Path) -> None:
    folder = run_federation(tmp_path / "f", rounds=1)
    config, template = load_federation(folder), read_adapter(folder / START_FOLDER)
    with closing(opened(folder)) as store:
        with pytest.raises(ValueError, match="client-0009 took part in no merge of run r"):
            withdraw(store, config, template, ["client-0001", "client-0009"])
        (path,) = folder.rglob(store.contributions(1)[0].digest)
        path.unlink()
        with pytest.raises(ValueError, match="round 1 cannot be merged again: no artifact"):
            withdraw(store, config, template, ["client-0001"])
        assert len(store.receipts()) == len(store.publications()) == 1
    privacy = {"clip": 1.0, "epsilon": 50.0, "delta": 1e-3}
    changes = {"rounds": 1, "recipe": {"method": "fedit"}, "privacy": privacy}
    folder = run_federation(tmp_path / "g", **changes)
    with closing(opened(folder)) as store, pytest.raises(ValueError, match="is noise on a sum"):
        withdraw(store, load_federation(folder), template, ["client-0001"])

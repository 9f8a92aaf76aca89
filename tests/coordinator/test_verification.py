"""Receipts are true of every kind of federation, and false of every one that was tampered with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from anabranch.coordinator.federation import START_FOLDER, load_federation
from anabranch.coordinator.lineage import published, roll_back
from anabranch.coordinator.registry import client_keys
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.verification import Verdict, Verifier
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.keys import by_id, seeded_key
from anabranch.wire.receipt import decode_receipt
from anabranch.wire.signing import KeyRing

Run = Callable[..., Path]
RING = KeyRing(by_id([seeded_key("coordinator", 0).public]))


def opened(folder: Path) -> Store:
    config = load_federation(folder)
    return open_store(config.store, folder, federation=config.name, run=config.run, durable=False)


def verify(folder: Path, ring: KeyRing | None = RING) -> list[Verdict]:
    with closing(opened(folder)) as store:
        config = load_federation(folder)
        clients = KeyRing(client_keys(folder).enrolled) if config.signed else None
        template = read_adapter(folder / START_FOLDER)
        verifier = Verifier(store, config, template, ring, clients)
        return [verifier.verify(data) for data in store.receipts()]


def checks(verdict: Verdict, *but: str) -> list[tuple[str, str, str]]:
    """What did not end well, or what did besides."""
    return [
        (check.what, check.about, check.status) for check in verdict.checks if check.status != "ok"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"signed": True, "sealed": True},
        {"recipe": {"method": "ties"}, "codec": {"density": 0.2, "feedback": 1.0}},
        {"recipe": {"method": "dare_ties", "params": {"seed": 2**60}}},
        {"recipe": {"method": "fisher"}, "down": "bf16"},
        {"trains": "alternate"},
        {"ranks": {"client-0000": 1, "client-0002": 2}, "recipe": {"method": "tsv_m"}},
        {"ranks": {"client-0000": 1}, "recipe": {"method": "hetlora"}},
        {"rest": "flora"},
        {
            "down_codec": {"density": 0.2, "feedback": 1.0},
            "codec": {"density": 0.3, "feedback": 1.0},
        },
        {
            "recipe": {"method": "fedit"},
            "privacy": {"clip": 1.0, "epsilon": 50.0, "delta": 1e-3, "noise_seed": 7},
        },
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_a_federation_did_is_done_again_bit_by_bit(
    run_federation: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = run_federation(tmp_path / "f", **{"rounds": 2, **changes})
    for verdict in verify(folder):
        assert checks(verdict) == []
        assert verdict.outcome == "true"
        done = {check.what: check.text for check in verdict.checks}
        assert "bit by bit" in done["merge"]
        assert len([check for check in verdict.checks if check.what == "input"]) == 3


def test_an_update_that_came_late_is_merged_again_from_its_own_start(
    run_federation: Run, tmp_path: Path
) -> None:
    """Round 3 is abandoned, and 4 a rollback; of its two updates round 5 carries one."""
    changes = {"quorum": 3, "collect": {"stragglers": "carry"}}
    folder = run_federation(tmp_path / "f", [(3, 11)], **changes)
    with closing(opened(folder)) as store:
        template = read_adapter(folder / START_FOLDER)
        roll_back(store, load_federation(folder), template, published(store)[0])
    run_federation(folder, [(5, 10)], rounds=5, **changes)
    verdicts = verify(folder)
    kinds = [verdict.receipt.kind for verdict in verdicts]
    assert kinds == ["merge", "merge", "abandoned", "rollback", "merge"]
    late = [(one.client, one.round, one.factor) for one in verdicts[4].receipt.inputs]
    assert late == [("client-0001", 5, 1.0), ("client-0002", 5, 1.0), ("client-0000", 3, 2**-0.5)]
    assert [checks(verdict) for verdict in verdicts] == [[]] * 5


def test_of_a_secure_federation_the_merge_of_its_sums_is_done_again(
    run_federation: Run, tmp_path: Path
) -> None:
    changes = {"signed": True, "secure": {}, "recipe": {"method": "fedit"}}
    folder = run_federation(tmp_path / "f", quorum=3, rounds=2, **changes)
    verdicts = verify(folder)
    assert [checks(verdict) for verdict in verdicts] == [[], []]
    assert [len(verdict.receipt.inputs) for verdict in verdicts] == [1, 1]


def test_a_change_s_remainder_is_lost_with_a_restart_and_found_again(
    run_federation: Run, tmp_path: Path
) -> None:
    changes = {
        "down_codec": {"density": 0.1, "feedback": 1.0}, "codec": {"density": 0.3, "feedback": 0.0}
    }  # fmt: skip
    folder = run_federation(tmp_path / "f", **changes, rounds=2)
    run_federation(folder, **changes, rounds=4)
    assert [verdict.outcome for verdict in verify(folder)] == ["true"] * 4
    one = run_federation(tmp_path / "g", **changes, rounds=4)
    with closing(opened(folder)) as cut, closing(opened(one)) as whole:
        ends = [store.publications()[-1].adapter_hash for store in (cut, whole)]
    assert ends[0] != ends[1]


def test_noise_that_nobody_keeps_leaves_it_undecided(run_federation: Run, tmp_path: Path) -> None:
    privacy = {"clip": 1.0, "epsilon": 50.0, "delta": 1e-3}
    folder = run_federation(tmp_path / "f", rounds=1, recipe={"method": "fedit"}, privacy=privacy)
    (verdict,) = verify(folder)
    assert (verdict.outcome, checks(verdict)) == ("undecided", [("merge", "", "open")])


def test_without_a_key_a_signature_decides_nothing(run_federation: Run, tmp_path: Path) -> None:
    folder = run_federation(tmp_path / "f", rounds=1, signed=True)
    (verdict,) = verify(folder, None)
    assert (verdict.outcome, checks(verdict)) == ("undecided", [("signature", "", "open")])
    other = KeyRing(by_id([seeded_key("coordinator", 1).public]))
    (verdict,) = verify(folder, other)
    assert (verdict.outcome, checks(verdict)) == ("false", [("signature", "", "failed")])


def test_a_missing_input_is_named_and_an_altered_one_too(
    run_federation: Run, tmp_path: Path
) -> None:
    folder = run_federation(tmp_path / "f", garbage=[(2, 11)])
    with closing(opened(folder)) as store:
        receipts = [decode_receipt(data, None) for data in store.receipts()]
    assert [len(receipt.inputs) for receipt in receipts] == [3, 2, 3]
    missing, altered = receipts[0].inputs[1], receipts[1].inputs[0]
    path = next(folder.rglob(missing.artifact))
    path.unlink()
    path = next(folder.rglob(altered.artifact))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    one, two, three = verify(folder)
    assert one.outcome == "undecided"
    assert checks(one) == [("input", missing.client, "open"), ("merge", "", "open")]
    assert two.outcome == "false"
    assert checks(two) == [("input", altered.client, "failed"), ("merge", "", "open")]
    assert three.outcome == "true"


def test_an_update_that_is_in_no_receipt_is_missed(run_federation: Run, tmp_path: Path) -> None:
    folder = run_federation(tmp_path / "f", rounds=1)
    with closing(opened(folder)) as store:
        row = store.contributions(1)[0].model_copy(update={"client": "x", "digest": "00" * 32})
        assert store.admit(row)
    (verdict,) = verify(folder)
    assert checks(verdict) == [("admitted", "", "failed")]
    texts = {check.what: check.text for check in verdict.checks}
    assert texts["admitted"] == "it leaves out what the store admitted of x"


def test_a_lost_start_leaves_the_next_merge_open(run_federation: Run, tmp_path: Path) -> None:
    folder = run_federation(tmp_path / "f")
    with closing(opened(folder)) as store:
        next(folder.rglob(store.publications()[0].digest)).unlink()
    one, two, three = verify(folder)
    assert checks(one) == [("output", "", "open")]
    assert checks(two) == [("merge", "", "open")]
    assert three.outcome == "true"


def test_a_private_rounds_receipt_lets_nobody_check_a_guess(
    run_federation: Run, tmp_path: Path
) -> None:
    """What one client sent leaves no trace without noise; the store can still be held to it."""
    privacy = {"clip": 1.0, "epsilon": 50.0, "delta": 1e-3, "noise_seed": 7}
    changes = {"recipe": {"method": "fedit"}, "privacy": privacy}
    folder = run_federation(tmp_path / "f", [(2, 11)], rounds=2, quorum=2, **changes)
    with closing(opened(folder)) as store:
        rows, receipts = store.contributions(), store.receipts()
        secret = store.notes("receipt-secret")[0]["secret"]
        assert secret not in str(store.history())
    assert len(rows) == 5
    for row in rows:
        for data in receipts:
            assert row.digest.encode() not in data
            assert str(row.size_bytes).encode() not in data
    assert secret.encode() not in b"".join(receipts)
    reads = [decode_receipt(data, None) for data in receipts]
    assert len({one.artifact for read in reads for one in read.inputs}) == 5
    assert len({one.weight for read in reads for one in read.inputs}) == 1
    assert [(one.code != "", one.reason) for one in reads[1].exclusions] == [(True, "")]
    assert [verdict.outcome for verdict in verify(folder)] == ["true"] * 2
    # Another update in the store than the one that was merged is found out.
    path = next(folder.rglob(rows[0].digest))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert ("input", rows[0].client, "failed") in checks(verify(folder)[0])
    # So is a row that names another one.
    with closing(opened(folder)) as store, store.engine.begin() as connection:  # type: ignore[attr-defined]
        change = text("UPDATE contributions SET digest = :new WHERE digest = :old")
        connection.execute(change, {"new": rows[1].digest, "old": rows[0].digest})
    failed = checks(verify(folder)[0])
    assert ("input", rows[0].client, "failed") in failed
    assert ("admitted", "", "ok") not in failed

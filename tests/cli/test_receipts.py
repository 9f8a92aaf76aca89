"""Receipts and adapters from the command line, on a federation that really ran."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.coordinator.federation import START_FOLDER, load_federation, write_federation
from anabranch.coordinator.published import check_folder
from anabranch.coordinator.store import open_store
from anabranch.vectors.peft_folder import read_adapter, write_adapter
from anabranch.wire.keys import by_id, read_public, seeded_key
from anabranch.wire.receipt import check_chain, decode_receipt, receipt_hash
from anabranch.wire.signing import KeyRing

RunFederation = Callable[..., Path]


@pytest.fixture(scope="module")
def original() -> dict[str, Path]:
    """Where the federation that ran once is kept, to be copied."""
    return {}


@pytest.fixture
def folder(
    original: dict[str, Path],
    run_federation: RunFederation,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A signed federation of three rounds, in the second of which client 1 lied."""
    if not original:
        place = tmp_path_factory.mktemp("once") / "f"
        original["f"] = run_federation(place, garbage=[(2, 11)], signed=True, evaluate_every=1)
    shutil.copytree(original["f"], tmp_path / "f")
    return tmp_path / "f"


def receipts(folder: Path) -> list[bytes]:
    config = load_federation(folder)
    store = open_store(config.store, folder, federation=config.name, run=config.run)
    found = store.receipts()
    store.close()
    return found


def test_receipts_are_listed_shown_and_written(run: Any, folder: Path, tmp_path: Path) -> None:
    chain = receipts(folder)
    code, out, _ = run("receipts", "list", folder, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["round"], row["kind"], row["inputs"], row["exclusions"]) for row in rows] == [
        (1, "merge", 3, 0), (2, "merge", 2, 1), (3, "merge", 3, 0),
    ]  # fmt: skip
    assert [row["hash"] for row in rows] == [receipt_hash(data) for data in chain]
    code, out, _ = run("receipts", "list", folder)
    assert (code, len(out.splitlines())) == (0, 3)
    for which in ("2", rows[1]["hash"], rows[1]["hash"][:10]):
        code, out, _ = run("receipts", "show", folder, which)
        assert code == 0
        assert "client-0001  truncated: the message ends after 7 bytes" in out
        assert "client-0002" in out
    code, out, _ = run("receipts", "show", folder, "last", "--json")
    assert json.loads(out) == json.loads(chain[2])
    assert run("receipts", "show", folder, "2", "-o", tmp_path / "two.json")[0] == 0
    assert (tmp_path / "two.json").read_bytes() == chain[1]
    for which in ("9", "zz", ""):
        code, _, err = run("receipts", "show", folder, which)
        assert (code, err.count("\n")) == (2, 1)


def test_verify_says_true_and_its_exit_codes_say_why_not(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    code, out, _ = run("verify", "all", "--store", folder)
    assert code == 0
    assert out.count("is true") == 3
    assert out.count("done again, it gives the same adapter, bit by bit") == 3
    chain = receipts(folder)
    file = tmp_path / "receipt.json"

    def verdict(data: bytes, *options: Any) -> tuple[int, Any]:
        file.write_bytes(data)
        code, out, err = run("verify", file, "--store", folder, "--json", *options)
        return code, json.loads(out)[0] if out else err

    code, told = verdict(chain[1])
    assert (code, told["outcome"], told["round"]) == (0, "true", 2)
    # One digit of a weight, as whoever holds the file can change it.
    code, told = verdict(chain[1].replace(b'"weight":0.5', b'"weight":0.6', 1))
    assert (code, told["outcome"]) == (1, "false")
    failed = {check["what"]: check["text"] for check in told["checks"] if check["status"] != "ok"}
    assert sorted(failed) == ["chain", "signature"]
    assert "bad-signature" in failed["signature"]
    # A stranger's key, and what is no receipt.
    (tmp_path / "other.pub").write_text(seeded_key("coordinator", 9).public.line + "\n")
    code, told = verdict(chain[1], "--key", tmp_path / "other.pub")
    assert (code, told["outcome"]) == (1, "false")
    code, err = verdict(chain[1] + b"\n")
    assert (code, err.count("\n")) == (2, 1)
    assert "canonical" in err
    # The merge itself: what came out is not what goes in with another recipe.
    first = decode_receipt(chain[0], None)
    next(folder.rglob(first.inputs[2].artifact)).unlink()
    code, told = verdict(chain[0])
    assert (code, told["outcome"]) == (3, "undecided")
    texts = [check["text"] for check in told["checks"] if check["status"] == "open"]
    assert texts[0] == f"artifact {first.inputs[2].artifact} is missing"
    code, out, _ = run("verify", "1", "--store", folder)
    assert code == 3
    assert "cannot be decided" in out
    next(folder.rglob(first.inputs[1].artifact)).write_bytes(b"x")
    code, told = verdict(chain[0])
    assert code == 1
    assert {check["about"]: check["status"] for check in told["checks"] if check["about"]} == {
        "client-0000": "ok", "client-0001": "failed", "client-0002": "open",
    }  # fmt: skip


def test_a_merge_that_was_never_made_is_found_out(run: Any, folder: Path, tmp_path: Path) -> None:
    """Signed by the coordinator itself, in its own chain: only the merge tells."""
    from anabranch.coordinator.store.database import connect
    from anabranch.coordinator.store.schema import receipts as table
    from anabranch.wire.receipt import encode_receipt

    chain = receipts(folder)
    key = seeded_key("coordinator", 0)
    last = decode_receipt(chain[2], None)
    lied = last.model_copy(update={"recipe": {**last.recipe, "scale": 0.5}})
    data = encode_receipt(lied, key)
    engine = connect(f"sqlite:///{folder}/store.db")
    with engine.begin() as connection:
        connection.execute(table.update().where(table.c.number == 3).values(content=data.decode()))
    engine.dispose()
    code, out, _ = run("verify", "3", "--store", folder, "--json")
    (told,) = json.loads(out)
    assert (code, told["outcome"]) == (1, "false")
    failed = [check for check in told["checks"] if check["status"] != "ok"]
    assert [check["what"] for check in failed] == ["merge"]
    assert "it gives another adapter" in failed[0]["text"]
    assert "off by" in failed[0]["text"]


def test_adapters_are_listed_tagged_and_exported(run: Any, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("adapters", "tag", folder, "champion", "2")
    assert code == 0
    code, out, _ = run("adapters", "list", folder, "--json")
    rows = json.loads(out)
    assert [row["tags"] for row in rows] == [[], ["champion"], []]
    assert [row["in_service"] for row in rows] == [False, False, True]
    code, out, _ = run("adapters", "list", folder)
    assert out.splitlines()[2].startswith("*    3  merge")
    for which in ("champion", "2", rows[1]["adapter_hash"][:8]):
        place = tmp_path / f"out-{which}"
        assert run("adapters", "export", folder, which, "-o", place)[0] == 0
        assert read_adapter(place).hash() == rows[1]["adapter_hash"]
        ring = KeyRing(by_id(read_public(folder / "keys" / "coordinator.pub")))
        assert check_folder(place, ring)["adapter_hash"] == rows[1]["adapter_hash"]
        data = (place / "receipt.json").read_bytes()
        assert receipt_hash(data) == rows[1]["receipt"]
        assert decode_receipt(data, ring).round == 2
    code, out, _ = run("verify", tmp_path / "out-2" / "receipt.json", "--store", folder)
    assert code == 0
    card = (tmp_path / "out-2" / "README.md").read_text()
    for text in (
        "library_name: peft", "# f, round 2", "merged from the updates of 2 clients; 1 others",
        "| method | mean |", rows[1]["receipt"], rows[1]["adapter_hash"],
            "| accuracy (the adapter before it, mean) |",
    ):  # fmt: skip
        assert text in card
    code, _, err = run("adapters", "export", folder, "2", "-o", tmp_path / "out-2")
    assert (code, err.count("\n")) == (2, 1)
    assert run("adapters", "tag", folder, "champion", "--remove")[0] == 0
    assert json.loads(run("adapters", "list", folder, "--json")[1])[1]["tags"] == []
    for arguments, reason in (
        (("tag", folder, "champion", "--remove"), "is no tag"),
        (("tag", folder, "7", "2"), "stands for a round already"),
        (("tag", folder, "a/b", "2"), "is no name"),
        (("tag", folder, "x", "9"), "stands for no adapter"),
        (("export", folder, "none", "-o", tmp_path / "n"), "stands for no adapter"),
        (("rollback", folder, "3"), "is in service already"),
        (("rollback", folder, "1", "--reason", "x" * 1001), "at most 1000"),
    ):
        code, _, err = run("adapters", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err


def test_a_rollback_is_a_round_from_which_the_next_one_starts(
    run: Any, folder: Path, run_federation: RunFederation, tmp_path: Path
) -> None:
    rows = json.loads(run("adapters", "list", folder, "--json")[1])
    write_adapter(read_adapter(folder / START_FOLDER), folder / "adapter")
    code, out, _ = run("adapters", "rollback", folder, "1", "--reason", "it forgot Swahili")
    assert code == 0
    assert "round 4 puts the adapter of round 1 in service again" in out
    # What is served from the folder is what is in service.
    assert read_adapter(folder / "adapter").hash() == rows[0]["adapter_hash"]
    assert "put in service again by a rollback" in (folder / "adapter" / "README.md").read_text()
    assert run("verify", "all", "--store", folder)[0] == 0
    config = load_federation(folder)
    write_federation(config.model_copy(update={"rounds": 5}), folder)
    run_federation(folder, rounds=5, signed=True, evaluate_every=1)
    code, out, _ = run("verify", "all", "--store", folder, "--json")
    told = json.loads(out)
    assert code == 0
    assert [row["kind"] for row in told] == ["merge", "merge", "merge", "rollback", "merge"]
    ring = KeyRing(by_id([seeded_key("coordinator", 0).public]))
    chain = check_chain(receipts(folder), ring)
    assert chain[3].restored is not None
    assert (chain[3].reason, chain[3].restored.round) == ("it forgot Swahili", 1)
    assert chain[3].restored.receipt == rows[0]["receipt"]
    assert chain[4].start_hash == rows[0]["adapter_hash"]
    after = json.loads(run("adapters", "list", folder, "--json")[1])
    assert [row["kind"] for row in after][3:] == ["rollback", "merge"]
    assert after[4]["in_service"]


def test_a_client_is_withdrawn(run: Any, folder: Path) -> None:
    shutil.copytree(folder / START_FOLDER, folder / "adapter")
    code, out, _ = run("adapters", "withdraw", folder, "client-0001")
    assert code == 0
    # It lied in round 2, which starts elsewhere now all the same.
    assert "round 4: 3 merges done again, from round 1 on, without client-0001" in out
    assert run("verify", "all", "--store", folder)[0] == 0
    rows = json.loads(run("adapters", "list", folder, "--json")[1])
    assert [row["kind"] for row in rows] == ["merge", "merge", "merge", "withdrawal"]
    assert read_adapter(folder / "adapter").hash() == rows[3]["adapter_hash"]
    card = (folder / "adapter" / "README.md").read_text()
    assert "Not undone is what others trained on top" in card
    code, _, err = run("adapters", "withdraw", folder, "client-0007")
    assert (code, err.count("\n")) == (2, 1)


def test_what_retention_let_go_of_cannot_be_put_back(run: Any, folder: Path) -> None:
    rows = json.loads(run("adapters", "list", folder, "--json")[1])
    next(folder.rglob(rows[0]["artifact"])).unlink()
    code, _, err = run("adapters", "rollback", folder, "1")
    assert (code, err.count("\n")) == (2, 1)
    assert "the adapter of round 1 is not kept any more" in err
    assert len(receipts(folder)) == 3

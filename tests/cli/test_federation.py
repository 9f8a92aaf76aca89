from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anabranch.coordinator.federation import FederationConfig, write_federation
from anabranch.coordinator.rounds.control import Want, latest
from anabranch.coordinator.store import Contribution, Refusal, Store, open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_federation(FederationConfig(name="demo", run="1", rounds=3), tmp_path)
    return tmp_path


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    config = FederationConfig(name="demo", run="1")
    opened = open_store(config.store, folder, federation="demo", run="1")
    yield opened
    opened.close()


def test_status_tells_where_a_round_stands(run: Any, folder: Path, store: Store) -> None:
    store.note("round", {"round": 1, "status": "abandoned", "reason": "0 admitted"})
    store.note("planned", {"round": 2, "asked": ["a", "b", "c"]})
    store.note("state", {"round": 2, "state": "collecting"})
    store.admit(Contribution(round=2, client="a", digest=store.put(b"x"), size_bytes=1))
    store.refuse(Refusal(round=2, client="b", code="norm", reason="too large"))
    # After a restart only who is missing is asked.
    store.note("planned", {"round": 2, "asked": ["b", "c"]})
    code, out, _ = run("federation", "status", folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["round"], found["state"], found["done"]) == (2, "collecting", 1)
    assert (found["asked"], found["admitted"]) == (["a", "b", "c"], ["a"])
    assert found["refused"] == {"norm": 1}
    assert (found["abandoned"], found["last"], found["want"]) == (1, "0 admitted", "run")
    code, out, _ = run("federation", "status", folder)
    assert "round 2 is collecting: 1 of 3 admitted" in out
    assert "without an update: b, c" in out


def test_a_federation_that_has_not_begun(run: Any, folder: Path) -> None:
    code, out, _ = run("federation", "status", folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["round"], found["state"], found["adapter_hash"]) == (None, None, None)


@pytest.mark.parametrize(
    ("word", "want"),
    [("pause", Want.PAUSE), ("resume", Want.RUN), ("drain", Want.DRAIN), ("abort", Want.ABORT)],
)
def test_what_is_asked_stands_in_the_store(
    run: Any, folder: Path, store: Store, word: str, want: Want
) -> None:
    code, out, _ = run("federation", word, folder)
    assert code == 0
    assert f"demo: asked to {want.value}" in out
    assert latest(store) is want


def test_nothing_is_asked_of_what_is_over(run: Any, folder: Path, store: Store) -> None:
    store.note("round", {"round": 3, "status": "abandoned", "reason": "0 admitted"})
    code, _, err = run("federation", "pause", folder)
    assert code == 2
    assert "all 3 rounds are over" in err


def test_a_folder_that_is_none(run: Any, tmp_path: Path) -> None:
    code, _, err = run("federation", "status", tmp_path / "none")
    assert code == 2
    assert "federation.toml" in err
    assert len(err.splitlines()) == 1


def test_federations_of_one_database_are_listed(run: Any, folder: Path, store: Store) -> None:
    store.note("planned", {"round": 1, "asked": ["a", "b"]})
    store.note("state", {"round": 1, "state": "collecting"})
    other = folder / "other"
    config = FederationConfig.model_validate(
        {"name": "also", "run": "1", "store": {"url": f"sqlite:///{folder}/store.db"}}
    )
    write_federation(config, other)
    assert run("federation", "status", other)[0] == 0
    for place in (folder, other):
        code, out, _ = run("federation", "list", place, "--json")
        assert code == 0
        rows = json.loads(out)
        assert [(row["federation"], row["round"], row["asked"]) for row in rows] == [
            ("also", None, 0), ("demo", 1, 2),
        ]  # fmt: skip
    code, out, _ = run("federation", "list", folder)
    assert out.splitlines()[1] == (
        "demo, run 1: 0 rounds over, 0 published, 0 abandoned; round 1 is collecting: 0 of 2 "
        "admitted; asked to run"
    )
    write_federation(
        FederationConfig.model_validate({"name": "j", "run": "1", "store": {"url": "journal"}}),
        folder / "journal",
    )
    code, _, err = run("federation", "list", folder / "journal")
    assert (code, err.count("\n")) == (2, 1)
    assert "a journal holds one federation" in err

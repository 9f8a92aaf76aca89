from __future__ import annotations

from pathlib import Path
from typing import Any

from anabranch.coordinator.federation import (
    START_FOLDER,
    FederationConfig,
    load_federation,
    write_federation,
)
from anabranch.coordinator.store import Contribution, open_store


def test_a_federation_is_backed_up_and_restored(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    config = FederationConfig(name="demo", run="1")
    write_federation(config, folder)
    (folder / START_FOLDER).mkdir()
    store = open_store(config.store, folder, federation="demo", run="1")
    store.admit(Contribution(round=1, client="a", digest=store.put(b"abc"), size_bytes=3))
    store.close()
    code, out, _ = run("backup", folder, "-o", tmp_path / "f.tar")
    assert code == 0
    assert "demo, run 1: 1 contributions, 0 refusals, 0 publications" in out
    code, _, _ = run("restore", tmp_path / "f.tar", tmp_path / "g", "--store", "sqlite:///g.db")
    assert code == 0
    config = load_federation(tmp_path / "g")
    assert config.store.url == "sqlite:///g.db"
    store = open_store(config.store, tmp_path / "g", federation="demo", run="1")
    assert store.get(store.contributions(1)[0].digest) == b"abc"
    store.close()


def test_an_apis_state_is_backed_up_and_restored(run: Any, tmp_path: Path) -> None:
    config = tmp_path / "api.toml"
    config.write_text('federations = "federations"\nstate = "state"\n')
    given = ("--organisation", "host", "--role", "admin", "--federation", "*")
    invitation = ("-o", tmp_path / "root.invite")
    assert run("coordinator", "invite", config, "root", *given, *invitation)[0] == 0
    code, out, _ = run("backup", config, "-o", tmp_path / "api.tar")
    assert (code, "0 certificates, 1 audit entries, the last of hash" in out) == (0, True)
    code, _, err = run("restore", tmp_path / "api.tar", tmp_path / "new", "--store", "sqlite:///x")
    assert (code, "which has no store" in err, err.count("\n")) == (2, True, 1)
    code, _, err = run("restore", tmp_path / "api.tar", tmp_path / "state")
    assert (code, "exists already" in err, err.count("\n")) == (2, True, 1)
    assert run("restore", tmp_path / "api.tar", tmp_path / "new")[1].split("  ")[1] in out
    key = tmp_path / "new" / "ca.key"
    assert key.read_bytes() == (tmp_path / "state" / "ca.key").read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_is_one_line(run: Any, tmp_path: Path) -> None:
    for arguments, reason in (
        (("backup", tmp_path / "none", "-o", tmp_path / "f.tar"), "federation.toml"),
        (("restore", tmp_path / "none.tar", tmp_path / "g"), "none.tar"),
    ):
        code, _, err = run(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err

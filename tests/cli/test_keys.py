from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.published import sign_folder
from anabranch.vectors import Adapter, LoraFactors
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire.keys import new_key, read_private, read_public, write_key


def test_new_makes_a_key_once(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("keys", "new", "site-a", "--out", tmp_path)
    assert code == 0
    key = read_private(tmp_path / "site-a.key")
    assert key.public.id.hex() in out
    assert read_public(tmp_path / "site-a.pub") == [key.public]
    code, _, err = run("keys", "new", "site-a", "--out", tmp_path)
    assert code == 2
    assert "there is a key already; move it away first" in err
    assert read_private(tmp_path / "site-a.key").public == key.public


def test_a_name_that_is_none_is_one_line(run: Any, tmp_path: Path) -> None:
    code, _, err = run("keys", "new", "../a", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "is no name" in err


def test_keys_are_enrolled_listed_and_revoked(run: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("keys", "new", name, "--out", tmp_path / "new")[0] == 0
    files = [tmp_path / "new" / f"{name}.pub" for name in ("a", "b")]
    ids = [read_public(path)[0].id.hex() for path in files]
    assert run("keys", "enrol", tmp_path, *files)[0] == 0
    assert run("keys", "revoke", tmp_path, ids[1])[0] == 0
    code, out, _ = run("keys", "list", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == [
        {"id": ids[0], "client": "a", "state": "enrolled"},
        {"id": ids[1], "client": "b", "state": "revoked"},
    ]
    assert ids[0] in run("keys", "list", tmp_path)[1]
    for arguments, reason in (
        (("enrol", tmp_path, files[0]), "is enrolled already, as a's"),
        (("enrol", tmp_path, files[1]), "was revoked; make a new one"),
        (("enrol", tmp_path, tmp_path / "c.pub"), "no such list of public keys"),
        (("revoke", tmp_path, ids[1]), "is revoked already"),
        (("revoke", tmp_path, "00"), "no key 00 is enrolled"),
        (("list", tmp_path / "none"), "there is no such folder"),
    ):
        code, _, err = run("keys", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err


def test_verify_says_what_a_published_adapter_is(run: Any, tmp_path: Path) -> None:
    factors = LoraFactors(torch.ones(2, 8), torch.ones(6, 2), 4.0)
    adapter = Adapter({"layer": factors}, base_hash="ab" * 32)
    key = new_key("coordinator")
    _, public = write_key(key, tmp_path)
    write_adapter(adapter, tmp_path / "adapter")
    sign_folder(tmp_path / "adapter", adapter, FederationConfig(name="f", run="r"), key)
    code, out, _ = run("keys", "verify", tmp_path / "adapter", public)
    assert code == 0
    assert adapter.hash() in out
    write_key(new_key("other"), tmp_path)
    code, _, err = run("keys", "verify", tmp_path / "adapter", tmp_path / "other.pub")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown-key" in err

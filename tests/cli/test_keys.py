from __future__ import annotations

from pathlib import Path
from typing import Any

from anabranch.wire.keys import read_private, read_public


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

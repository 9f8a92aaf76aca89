from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.vectors.new_folder import begun, hidden_beside, new_folder, write_text


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as partial:
        write_text(partial / "a", "text")
        assert not out.exists()
    assert [path.read_text() for path in out.iterdir()] == ["text"]
    assert list(out.parent.iterdir()) == [out]


def interrupted(folder: Path) -> None:
    with new_folder(folder) as partial:
        write_text(partial / "a", "text")
        raise KeyboardInterrupt


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("precious")
    with pytest.raises(ValueError, match="out: exists already"), new_folder(tmp_path / "out"):
        raise AssertionError
    assert (tmp_path / "out" / "a").read_text() == "precious"


def test_what_was_begun_is_found_and_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out[1]"
    for name in (".out[1]", ".out[1].notes", ".out1.0123abcd", "out[1].0123abcd"):
        (tmp_path / name).mkdir()
    with new_folder(out, hidden_beside(out)) as partial:
        assert begun(out) == {partial}
    assert begun(out) == set()

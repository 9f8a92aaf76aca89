from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anabranch.wire.keys import new_key, read_private, read_public, seeded_key, write_key


def test_a_key_is_written_for_its_owner_alone_and_read_back(tmp_path: Path) -> None:
    key = new_key("site-a")
    private, public = write_key(key, tmp_path / "keys")
    assert private.stat().st_mode & 0o777 == 0o600
    assert read_private(private).public == key.public
    assert read_public(public) == [key.public]
    assert new_key("site-a").public != key.public


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    private, public = write_key(new_key("site-a"), tmp_path)
    before = private.read_bytes(), public.read_bytes()
    for _ in range(2):
        with pytest.raises(FileExistsError, match="there is a key already"):
            write_key(new_key("site-a"), tmp_path)
        assert before[0] == private.read_bytes()
        public.unlink(missing_ok=True)
    assert not public.exists()


@pytest.mark.parametrize("name", ["", "a b", "../a", ".a", "a/b", "é", "a" * 101, "a\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        seeded_key(name, 1)


def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    private, _ = write_key(new_key("site-a"), tmp_path)
    private.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_private(private)


def test_what_is_no_private_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anabranch keys new b`"):
        read_private(tmp_path / "b.key")
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for data, reason in ((b"nothing", "not a private key"), (other, "another kind")):
        path = tmp_path / "c.key"
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(ValueError, match=reason):
            read_private(path)


def test_a_list_of_public_keys_has_comments_and_names_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.pub"
    line = seeded_key("a", 1).public.line
    path.write_text(f"# ours\n\n{line}\n")
    assert read_public(path) == [seeded_key("a", 1).public]
    for bad, reason in (
        ("ssh-ed25519 AAAA a", "a line reads anabranch-ed25519 BASE64 NAME"),
        ("anabranch-ed25519 A?== a", "no base64"),
        ("anabranch-ed25519 AAAA a", "3 bytes, not 32"),
        (line.replace(" a", " ../a"), "is no name"),
    ):
        path.write_text(f"{line}\n{bad}\n")
        with pytest.raises(ValueError, match=f"line 2 is no public key: .*{reason}"):
            read_public(path)
    with pytest.raises(ValueError, match="no such list"):
        read_public(tmp_path / "none")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a list"):
        read_public(path)

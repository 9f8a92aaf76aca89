"""Ed25519 keys (RFC 8032) of clients and coordinators, and the files they lie in.

A private key is a PKCS#8 PEM file ``NAME.key`` that its owner alone may read. A public key is one
line, ``anabranch-ed25519 BASE64 NAME``; a file of such lines is a list of keys. Loads no torch.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KIND = "anabranch-ed25519"
NAME = re.compile(r"[\w.@:-]{1,100}", re.ASCII)
"""What a client may call itself: it stands in journals, reports, terminals and file names."""
RAW_BYTES, ID_BYTES, SIGNATURE_BYTES = 32, 16, 64


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        name: Whose it is.
        raw: The 32 bytes of RFC 8032.
    """

    name: str
    raw: bytes

    @cached_property
    def id(self) -> bytes:
        """Names the key in what it signs: the first 16 bytes of its sha256."""
        return hashlib.sha256(self.raw).digest()[:ID_BYTES]

    @property
    def line(self) -> str:
        """The key as files hold it."""
        return f"{KIND} {base64.b64encode(self.raw).decode()} {self.name}"

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether this key's owner signed the data."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, eq=False)
class PrivateKey:
    """A key that signs.

    Attributes:
        name: Whose it is.
        secret: The key itself.
    """

    name: str
    secret: Ed25519PrivateKey

    @cached_property
    def public(self) -> PublicKey:
        """The other half."""
        return PublicKey(self.name, self.secret.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """64 bytes; the same for the same data."""
        return self.secret.sign(data)


def new_key(name: str) -> PrivateKey:
    """A fresh key from the system's randomness.

    Raises:
        ValueError: The name is none.
    """
    return PrivateKey(checked_name(name), Ed25519PrivateKey.generate())


def seeded_key(name: str, seed: int) -> PrivateKey:
    """The key of a simulated party. Whoever knows seed and name has it: it protects nothing."""
    secret = hashlib.sha256(f"anabranch simulation\0{seed}\0{name}".encode()).digest()
    return PrivateKey(checked_name(name), Ed25519PrivateKey.from_private_bytes(secret))


def checked_name(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: It is not 1 to 100 of A-Z a-z 0-9 _ . @ : -, or begins with a dot.
    """
    if not NAME.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name[:100]!r} is no name: give 1 to 100 of A-Z a-z 0-9 _ . @ : -")
    return name


def write_key(key: PrivateKey, folder: Path) -> tuple[Path, Path]:
    """Write ``NAME.key`` (mode 0600) and ``NAME.pub``, never over another file.

    Returns:
        The two files.

    Raises:
        FileExistsError: There is such a file; the key in it may be in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / f"{key.name}.key", folder / f"{key.name}.pub"
    pem = key.secret.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for path, mode, data in (
        (public, 0o644, f"{key.public.line}\n".encode()),
        (private, 0o600, pem),
    ):
        if private.exists() or path.exists():
            raise FileExistsError(17, "there is a key already; move it away first", str(path))
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(number, "wb") as file:
            file.write(data)
    return private, public


def read_private(path: Path) -> PrivateKey:
    """Read a private key; the file's name is the owner's.

    Raises:
        ValueError: It is missing, others may read it, or it holds no Ed25519 key.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no key; make one with `anabranch keys new {path.stem}`")
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path}: others may read this private key; chmod 600 it")
    try:
        secret = serialization.load_pem_private_key(path.read_bytes(), password=None)
    # cryptography raises TypeError for an encrypted file, and a class of its own for other kinds.
    except Exception as error:
        raise ValueError(f"{path}: not a private key in unencrypted PEM") from error
    if not isinstance(secret, Ed25519PrivateKey):
        raise ValueError(f"{path}: a key of another kind than Ed25519; use `anabranch keys new`")
    return PrivateKey(checked_name(path.stem), secret)


def read_public(path: Path) -> list[PublicKey]:
    """Read a list of public keys; empty lines and those that begin with # are skipped.

    Raises:
        ValueError: A line is no public key; names the file and the line.
    """
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a list of public keys") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such list of public keys") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            try:
                keys.append(_public_key(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is no public key: {error}") from error
    return keys


def by_id(keys: Iterable[PublicKey]) -> dict[bytes, PublicKey]:
    """Keys as signatures name them."""
    return {key.id: key for key in keys}


def _public_key(line: str) -> PublicKey:
    words = line.split()
    if len(words) != 3 or words[0] != KIND:
        raise ValueError(f"a line reads {KIND} BASE64 NAME")
    try:
        raw = base64.b64decode(words[1], validate=True)
    except binascii.Error as error:
        raise ValueError("its second word is no base64") from error
    if len(raw) != RAW_BYTES:
        raise ValueError(f"the key has {len(raw)} bytes, not {RAW_BYTES}")
    return PublicKey(checked_name(words[2]), raw)

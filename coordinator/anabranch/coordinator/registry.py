"""The keys of a federation, in its folder: the coordinator's own, and who is enrolled or revoked.

``keys/coordinator.key`` signs plans and adapters. ``keys/enrolled`` and ``keys/revoked`` list
public keys, a line each (``wire.keys``); a key in both is revoked. A client may have several: enrol
its new key, let it sign with that, then revoke the old one. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anabranch.wire.keys import PrivateKey, PublicKey, by_id, read_private, read_public
from anabranch.wire.signing import KeyRing

KEYS_FOLDER = "keys"
COORDINATOR = "coordinator"
ENROLLED, REVOKED = "enrolled", "revoked"


def coordinator_key(federation: Path) -> PrivateKey:
    """The key that signs plans and adapters.

    Raises:
        ValueError: It is missing or cannot be used.
    """
    return read_private(federation / KEYS_FOLDER / f"{COORDINATOR}.key")


def client_keys(federation: Path) -> KeyRing:
    """Who may sign updates, as the files say now.

    Raises:
        ValueError: A line is no public key.
    """
    enrolled, revoked = (_listed(federation, name) for name in (ENROLLED, REVOKED))
    return KeyRing(by_id(enrolled), by_id(revoked))


def changed(federation: Path) -> tuple[tuple[int, int], ...]:
    """Times and sizes of the lists: other ones mean that ``client_keys`` has to be asked again."""
    paths = [federation / KEYS_FOLDER / name for name in (ENROLLED, REVOKED)]
    stats = [path.stat() for path in paths if path.exists()]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


def enrol(federation: Path, keys: Sequence[PublicKey]) -> None:
    """Let keys sign updates from now on.

    Raises:
        ValueError: One was enrolled or revoked before; nothing is changed.
    """
    ring = client_keys(federation)
    for key in keys:
        if key.id in ring.revoked:
            raise ValueError(
                f"key {key.id.hex()} of {key.name} was revoked; make a new one "
                f"with `anabranch keys new {key.name}`"
            )
        if key.id in ring.enrolled:
            name = ring.enrolled[key.id].name
            raise ValueError(f"key {key.id.hex()} is enrolled already, as {name}'s")
    _append(federation, ENROLLED, keys)


def revoke(federation: Path, key_id: str) -> PublicKey:
    """Refuse from now on what a key signs.

    Args:
        federation: The federation's folder.
        key_id: The enrolled key's id, in hexadecimal.

    Returns:
        The key.

    Raises:
        ValueError: No such key is enrolled, or it is revoked already.
    """
    ring = client_keys(federation)
    found = {key.id.hex(): key for key in ring.enrolled.values()}.get(key_id.lower())
    if found is None:
        raise ValueError(
            f"no key {key_id[:100]} is enrolled; `anabranch keys list {federation}` shows them"
        )
    if found.id in ring.revoked:
        raise ValueError(f"key {key_id} of {found.name} is revoked already")
    _append(federation, REVOKED, [found])
    return found


def _listed(federation: Path, name: str) -> list[PublicKey]:
    path = federation / KEYS_FOLDER / name
    return read_public(path) if path.exists() else []


def _append(federation: Path, name: str, keys: Sequence[PublicKey]) -> None:
    folder = federation / KEYS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.write("".join(f"{key.line}\n" for key in keys))

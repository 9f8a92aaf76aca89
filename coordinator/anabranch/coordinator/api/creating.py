"""A federation that is created by way of the API: written aside, checked, then put in its place."""

from __future__ import annotations

import re
import secrets
import shutil
import tomllib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from grpc import StatusCode

from anabranch.coordinator.api.identity import FEDERATION
from anabranch.coordinator.api.refusal import RefusedCallError
from anabranch.coordinator.federation import FEDERATION_FILE, START_FOLDER, load_federation
from anabranch.coordinator.registry import COORDINATOR, KEYS_FOLDER
from anabranch.coordinator.store.artifacts import NO_ROOM, full
from anabranch.coordinator.supervision.config import NODES_FOLDER
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.keys import new_key, write_key

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What a start adapter's folder may hold."""
NODE_KEY = re.compile(rf"{NODES_FOLDER}/[A-Za-z0-9][A-Za-z0-9_.@-]{{0,99}}\.pub", re.ASCII)
"""Public keys of SuperNodes."""
CONFIG_BYTES = 256 << 10
HOST_ONLY = {"store": ("url", "artifacts"), "gate": ("scorer",)}
"""What names places and code of the coordinator's machine: its host decides that, not a peer."""


class Creating:
    """One federation on its way in.

    Args:
        root: The folder of the federations.
        name: Its name.
        most_bytes: Of its start adapter.

    Raises:
        RefusedCallError: ``name`` or ``exists``.
    """

    def __init__(self, root: Path, name: str, most_bytes: int) -> None:
        if not FEDERATION.fullmatch(name):
            raise RefusedCallError(
                "name", f"{name[:100]!r} is no name of a federation: give 1 to 100 of A-Z a-z 0-9 "
                "_ -, a letter or digit first",
            )  # fmt: skip
        self._place, self._name, self._left = root / name, name, most_bytes
        self._aside = root / f".{secrets.token_hex(16)}.new"
        self._exists()

    def begin(self, config: str) -> None:
        """Take its configuration.

        Raises:
            RefusedCallError: ``config``.
        """
        if len(config.encode()) > CONFIG_BYTES:
            raise RefusedCallError("config", f"a configuration has at most {CONFIG_BYTES} bytes")
        try:
            raw = tomllib.loads(config)
        except tomllib.TOMLDecodeError as error:
            raise RefusedCallError("config", f"{FEDERATION_FILE}: {error}") from error
        for table, keys in HOST_ONLY.items():
            inner = raw.get(table)
            for key in keys:
                if isinstance(inner, dict) and key in inner:
                    raise RefusedCallError(
                        "config", f"{table}.{key} is decided on the coordinator's machine; leave "
                        "it out here and set it there",
                    )  # fmt: skip
        (self._aside / START_FOLDER).mkdir(parents=True)
        (self._aside / FEDERATION_FILE).write_text(config)
        try:
            found = load_federation(self._aside)
        except ValueError as error:
            reason = str(error).replace(str(self._aside), self._name)
            raise RefusedCallError("config", reason) from error
        if found.name != self._name:
            raise RefusedCallError("config", f"name is {found.name!r}, not {self._name!r}")
        self._signed = found.signed

    def add(self, file: str, data: bytes) -> None:
        """Take a part of a file of its start adapter, or of a node's key.

        Raises:
            RefusedCallError: ``file`` or ``too-large``.
            FullError: There is no room.
        """
        key = NODE_KEY.fullmatch(file)
        if file not in FILES and not key:
            known = ", ".join((*FILES, f"{NODES_FOLDER}/NAME.pub"))
            raise RefusedCallError("file", f"{file[:100]!r} is not one of {known}")
        self._left -= len(data)
        if self._left < 0:
            raise RefusedCallError(
                "too-large", "the start adapter is too large", StatusCode.RESOURCE_EXHAUSTED
            )
        try:
            path = self._aside / file if key else self._aside / START_FOLDER / file
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as out:
                out.write(data)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise full(self._name, error) from error
            raise

    def finish(self) -> None:
        """Check that it can begin, and put it in its place.

        Raises:
            RefusedCallError: ``start``: no adapter that names its base; ``node-key``; or
                ``exists``.
        """
        self._check_keys()
        try:
            template = read_adapter(self._aside / START_FOLDER)
        # Whatever a peer's bytes make a reader raise is that peer's refusal.
        except Exception as error:
            reason = str(error).replace(str(self._aside), self._name)
            raise RefusedCallError(
                "start", f"the start adapter cannot be read: {reason}"
            ) from error
        if template.base_hash is None:
            raise RefusedCallError(
                "start", "the start adapter names no base hash; write it with write_adapter"
            )
        if self._signed:
            write_key(new_key(COORDINATOR), self._aside / KEYS_FOLDER)
        self._exists()
        try:
            self._aside.rename(self._place)
        except OSError as error:
            self._exists()
            raise error

    def _check_keys(self) -> None:
        for path in sorted((self._aside / NODES_FOLDER).glob("*.pub")):
            try:
                load_ssh_public_key(path.read_bytes())
            except (ValueError, UnsupportedAlgorithm) as error:
                raise RefusedCallError(
                    "node-key", f"{path.name} is no public key in OpenSSH's form ({error})"
                ) from error

    def drop(self) -> None:
        """Forget it, unless it is in its place."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def _exists(self) -> None:
        if self._place.exists():
            raise RefusedCallError(
                "exists", f"there is a federation {self._name}", StatusCode.ALREADY_EXISTS
            )

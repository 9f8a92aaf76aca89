"""The federations of this coordinator, each opened once and shared by all calls."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from grpc import StatusCode

from anabranch.coordinator.api.identity import FEDERATION
from anabranch.coordinator.api.intake import Intake
from anabranch.coordinator.api.peers import Grant
from anabranch.coordinator.api.refusal import RefusedCallError, not_yours
from anabranch.coordinator.federation import (
    FEDERATION_FILE,
    START_FOLDER,
    FederationConfig,
    load_federation,
)
from anabranch.coordinator.store import Store, open_store
from anabranch.coordinator.store.config import JOURNAL_URL
from anabranch.coordinator.trust import Trust, trust_of
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter
from anabranch.wire.keys import PrivateKey


@dataclass(frozen=True)
class Served:
    """A federation.

    Attributes:
        folder: Where it is.
        config: What it is.
        store: What it remembers.
    """

    folder: Path
    config: FederationConfig
    store: Store

    @cached_property
    def template(self) -> Adapter:
        """The adapter it began with."""
        return read_adapter(self.folder / START_FOLDER)

    @cached_property
    def trust(self) -> Trust | None:
        """Keys, where it is signed."""
        return trust_of(self.folder, self.config, self.store) if self.config.signed else None

    @property
    def key(self) -> PrivateKey | None:
        """The coordinator's, where it signs."""
        return self.trust.key if self.trust else None

    @cached_property
    def intake(self) -> Intake:
        """What takes its updates."""
        return Intake(self.config, self.template, self.store, self.trust)


class Shelf:
    """Federations by name.

    Args:
        folder: Holds a folder of each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, tuple[int, Served]] = {}
        self._lock = threading.Lock()

    def names(self, grant: Grant) -> list[str]:
        """Names of those that a peer takes part in."""
        found = sorted(path.parent.name for path in self.folder.glob(f"*/{FEDERATION_FILE}"))
        return [name for name in found if FEDERATION.fullmatch(name) and grant.covers(name)]

    def get(self, grant: Grant, name: str) -> Served:
        """A federation that a peer takes part in; a changed configuration is read again.

        Raises:
            RefusedCallError: ``federation``: there is none that it takes part in; or
                ``not-served``: its folder cannot be served.
        """
        if not FEDERATION.fullmatch(name) or not grant.covers(name):
            raise not_yours(name)
        folder = self.folder / name
        try:
            stamp = (folder / FEDERATION_FILE).stat().st_mtime_ns
        except FileNotFoundError:
            raise not_yours(name) from None
        with self._lock:
            held = self._open.get(name)
            if held is None or held[0] != stamp:
                self._open[name] = stamp, _opened(folder)
                if held is not None:
                    held[1].store.close()
            return self._open[name][1]

    async def take(self, grant: Grant, name: str) -> Served:
        """As ``get``; opening one takes a while, and holds no other call up."""
        return await asyncio.to_thread(self.get, grant, name)

    def close(self) -> None:
        """Close every store."""
        for _, served in self._open.values():
            served.store.close()


def _opened(folder: Path) -> Served:
    try:
        config = load_federation(folder)
        if config.name != folder.name:
            raise ValueError(f"{folder}: it holds the federation {config.name}; rename one of both")
        if config.store.url == JOURNAL_URL:
            raise ValueError(
                f"{folder}: a journal is for one process; set store.url to a database, as "
                "sqlite:///store.db"
            )
        store = open_store(
            config.store, folder, federation=config.name, run=config.run, durable=config.durable
        )
    except (ValueError, FileNotFoundError) as error:
        raise RefusedCallError("not-served", str(error), StatusCode.FAILED_PRECONDITION) from error
    return Served(folder, config, store)

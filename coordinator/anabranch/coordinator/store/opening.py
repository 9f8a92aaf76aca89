"""Open the store a configuration names."""

from __future__ import annotations

from pathlib import Path

from anabranch.coordinator.store.artifacts import Artifacts, FolderArtifacts, S3Artifacts
from anabranch.coordinator.store.base import Store
from anabranch.coordinator.store.config import JOURNAL_URL, S3, SQLITE, StoreConfig
from anabranch.coordinator.store.folder import FolderStore


def open_store(
    config: StoreConfig,
    folder: Path,
    *,
    federation: str,
    run: str,
    durable: bool = True,
    patient: bool = False,
) -> Store:
    """The store of one run of a federation.

    Args:
        config: Where it is.
        folder: The federation's folder, which relative paths start from.
        federation: The federation's name.
        run: Its run.
        durable: What a method returned from survives a power failure too.
        patient: Wait for a database that is gone, as a running coordinator does
            (``store.patience_s``); whoever only looks wants to know at once.

    Raises:
        ValueError: It cannot be opened, or something it needs is not installed.
        FullError: There is no room for it.
        LostError: Its database was waited for, and did not come.
    """
    if config.url == JOURNAL_URL:
        return FolderStore(folder, durable=durable)
    # Simulations keep journals, and need not wait for SQLAlchemy to load.
    from anabranch.coordinator.store.database import connect
    from anabranch.coordinator.store.sql import SqlStore

    quota = config.quota_mb
    patience_s = config.patience_s if patient else 0.0
    return SqlStore(
        connect(database_of(config, folder), durable=durable, patience_s=patience_s),
        artifacts_of(config, folder, durable=durable),
        federation=federation,
        run=run,
        quota_bytes=None if quota is None else quota << 20,
        keep_rounds=config.keep_rounds,
        patience_s=patience_s,
    )


def database_of(config: StoreConfig, folder: Path) -> str:
    """The database's address, a relative file's made one of the folder."""
    if not config.url.startswith(SQLITE):
        return config.url
    return f"{SQLITE}{folder.absolute() / config.url.removeprefix(SQLITE)}"


def artifacts_of(config: StoreConfig, folder: Path, *, durable: bool) -> Artifacts:
    """Where the bytes are kept."""
    if config.artifacts.startswith(S3):
        return S3Artifacts(config.artifacts)
    return FolderArtifacts(folder / config.artifacts, durable=durable)

"""A preflight: what a coordinator would stumble over, looked at before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anabranch.coordinator.federation import START_FOLDER, FederationConfig, load_federation
from anabranch.coordinator.registry import client_keys, coordinator_key
from anabranch.coordinator.rounds.standing import standing
from anabranch.coordinator.store import open_store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.surroundings import (
    available_bytes,
    clock,
    database,
    key_files,
    port_free,
)
from anabranch.coordinator.trust import trust_of
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter

COPIES = 3
"""Dense copies of a cohort that a merge may hold: updates, what clients came to, task vectors."""


@dataclass(frozen=True)
class Finding:
    """What one look found.

    Attributes:
        check: What was looked at.
        ok: Whether a coordinator would start and run.
        told: What was found; where it is not ok, with what to do.
    """

    check: str
    ok: bool
    told: str


def examine_federation(folder: Path, ports: Sequence[tuple[str, int]] = ()) -> list[Finding]:
    """Look at a federation's folder and at what it names. Writes one byte into its artifacts.

    A look that another depends on ends the list where it fails.

    Args:
        folder: The federation's folder.
        ports: Hosts and ports that will be listened on: a SuperLink's, an API's, a dashboard's.
    """
    found = [look("port", partial(port_free, *address)) for address in ports]
    for finding in _findings(folder):
        found.append(finding)
        if not finding.ok and finding.check in ("configuration", "start adapter"):
            break
    return found


def _findings(folder: Path) -> Iterator[Finding]:
    config: list[FederationConfig] = []
    adapter: list[Adapter] = []
    yield look("configuration", lambda: _configuration(folder, config))
    yield look("start adapter", lambda: _start(folder, adapter))
    yield look("keys", lambda: _keys(folder, config[0]))
    yield look("key files", lambda: key_files(folder))
    yield look("database", lambda: database(config[0].store, folder))
    yield look("store", lambda: _store(folder, config[0]))
    yield look("clock", lambda: _clock(folder, config[0]))
    yield look("recipe", lambda: _recipe(folder, config[0], adapter[0]))
    yield look("disk", lambda: _disk(folder, config[0], adapter[0]))
    yield look("memory", lambda: _memory(config[0], adapter[0]))


def look(check: str, at: Callable[[], str]) -> Finding:
    """One look: what it says, or what it raises."""
    try:
        return Finding(check, True, at())
    # Whatever stops a coordinator is a finding: files, databases and settings fail in many ways.
    except Exception as error:
        return Finding(check, False, " ".join(str(error).split()) or type(error).__name__)


def _configuration(folder: Path, into: list[FederationConfig]) -> str:
    into.append(config := load_federation(folder))
    return f"{config.name}, run {config.run}: {config.rounds} rounds, quorum {config.quorum}"


def _start(folder: Path, into: list[Adapter]) -> str:
    into.append(adapter := read_adapter(folder / START_FOLDER))
    base = adapter.base_hash
    if base is None:
        raise ValueError("it names no base hash; write it with write_adapter")
    entries = sum(tensor.numel() for tensor in adapter.tensors().values())
    return f"{len(adapter.lora)} modules, {entries} entries, of base {base[:12]}"


def _keys(folder: Path, config: FederationConfig) -> str:
    if not config.signed:
        return "not signed: whoever reaches the SuperLink is believed"
    coordinator_key(folder)
    ring = client_keys(folder)
    names = {key.name for key_id, key in ring.enrolled.items() if key_id not in ring.revoked}
    if len(names) < config.quorum:
        raise ValueError(
            f"{len(names)} clients are enrolled, and the quorum is {config.quorum}; enrol more: "
            f"`anabranch keys enrol {folder} KEY.pub`"
        )
    return f"{len(names)} clients are enrolled"


def _store(folder: Path, config: FederationConfig) -> str:
    with closing(open_store(config.store, folder, federation=config.name, run=config.run)) as store:
        digest = store.put(b"\0")
        if store.get(digest) != b"\0":
            raise ValueError(f"{config.store.artifacts} does not give back what it was given")
        now = standing(config, store)
    return (
        f"{config.store.url.split('@')[-1]}: {now.done} rounds are over, {now.published} published"
    )


def _clock(folder: Path, config: FederationConfig) -> str:
    with closing(open_store(config.store, folder, federation=config.name, run=config.run)) as store:
        return clock(config.store, folder, store.last_receipt())


def _recipe(folder: Path, config: FederationConfig, adapter: Adapter) -> str:
    with closing(open_store(config.store, folder, federation=config.name, run=config.run)) as store:
        MergeStrategy(
            config, adapter, store, trust_of(folder, config, store) if config.signed else None
        )
    return f"{config.recipe.method} can merge a quorum of {config.quorum}"


def _cohort_bytes(config: FederationConfig, adapter: Adapter) -> int:
    """Of the updates of a round, dense in fp32."""
    one = sum(4 * tensor.numel() for tensor in adapter.tensors().values())
    return one * config.asked(max(config.clients, config.quorum))


def _disk(folder: Path, config: FederationConfig, adapter: Adapter) -> str:
    free, most = shutil.disk_usage(folder).free, _cohort_bytes(config, adapter)
    kept = config.store.keep_rounds or config.rounds
    if free < most:
        raise ValueError(
            f"{free / 1e6:.0f} MB are free, and updates of one round may be {most / 1e6:.0f} MB; "
            "free some, or set store.artifacts to another place"
        )
    told = f"{free / 1e9:.1f} GB free; {kept} rounds are kept, of at most {most / 1e6:.1f} MB each"
    return told if free >= kept * most else f"{told}: set store.keep_rounds if updates are dense"


def _memory(config: FederationConfig, adapter: Adapter) -> str:
    free = available_bytes()
    most = COPIES * _cohort_bytes(config, adapter)
    if free < most:
        raise ValueError(
            f"{free / 1e6:.0f} MB are free, and a merge may hold {most / 1e6:.0f} MB; "
            "lower clients or fraction, or take a larger machine"
        )
    return f"{free / 1e9:.1f} GB free, a merge holds at most {most / 1e6:.1f} MB"

"""The Flower ServerApp: run the federation whose folder the run configuration names."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anabranch.coordinator.federation import START_FOLDER, load_federation
from anabranch.coordinator.gate import gate_of
from anabranch.coordinator.lineage import dress, published, read_published
from anabranch.coordinator.logs import configure
from anabranch.coordinator.published import sign_folder
from anabranch.coordinator.store import open_store
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.coordinator.supervision.lease import held
from anabranch.coordinator.trust import trust_of
from anabranch.vectors import Adapter
from anabranch.vectors.peft_folder import read_adapter, write_adapter

ADAPTER_FOLDER = "adapter"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every round and write the adapter in service as a PEFT folder."""
    folder = Path(str(context.run_config["federation"]))
    with held(folder, str(context.run_id)):
        run_federation(grid, folder)


def run_federation(grid: Grid, folder: Path) -> None:
    """Run what is left of a folder's federation.

    Raises:
        ValueError: The folder is not sound.
        RuntimeError: Too few clients joined.
    """
    config = load_federation(folder)
    about = {"federation": config.name, "run": config.run}
    configure(about=about, level=logging.INFO)
    opened = open_store(
        config.store, folder, federation=config.name, run=config.run, durable=config.durable,
        patient=True,
    )  # fmt: skip
    with closing(opened) as store:
        trust = trust_of(folder, config, store) if config.signed else None
        template = read_adapter(folder / START_FOLDER)
        gate = gate_of(config.gate, folder)
        strategy = MergeStrategy(config, template, store, trust, gate)
        strategy.start(grid)
        rows, adapter = published(store), strategy.adapter
        if rows:
            # A rollback may have come after the last round.
            adapter = read_published(store, config, template, rows[-1].publication)
        key = trust.key if trust else None

        def finish(partial: Path, _: Adapter) -> None:
            if rows:
                dress(partial, adapter, config, rows[-1], key)
            elif key is not None:
                sign_folder(partial, adapter, config, key)

        publish(adapter, folder / ADAPTER_FOLDER, finish)


def publish(
    adapter: Adapter, folder: Path, finish: Callable[[Path, Adapter], None] | None = None
) -> None:
    """Write an adapter's PEFT folder in place of an earlier one; finished before it appears."""
    fresh, old = (folder.with_name(f"{folder.name}.{word}") for word in ("new", "old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    write_adapter(adapter, fresh)
    if finish is not None:
        finish(fresh, adapter)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

"""The Flower ServerApp: run the federation whose folder the run configuration names."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from anabranch.coordinator.federation import START_FOLDER, load_federation
from anabranch.coordinator.store import FolderStore
from anabranch.coordinator.strategy import MergeStrategy
from anabranch.vectors.peft_folder import read_adapter, write_adapter

ADAPTER_FOLDER = "adapter"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every round and write the adapter in service as a PEFT folder."""
    folder = Path(str(context.run_config["federation"]))
    config = load_federation(folder)
    store = FolderStore(folder, durable=config.durable)
    strategy = MergeStrategy(config, read_adapter(folder / START_FOLDER), store)
    strategy.start(grid)
    write_adapter(strategy.adapter, folder / ADAPTER_FOLDER)

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anabranch.coordinator.federation import (
    START_FOLDER,
    FederationConfig,
    load_federation,
    write_federation,
)
from anabranch.coordinator.store import Contribution, Publication, Refusal, Store, StoreConfig
from anabranch.coordinator.store import open_store as open_any
from anabranch.coordinator.store.backup import backup, restore


def federation(folder: Path, url: str) -> FederationConfig:
    config = FederationConfig(name="f", run="r", store=StoreConfig(url=url))
    write_federation(config, folder)
    (folder / START_FOLDER).mkdir()
    (folder / START_FOLDER / "adapter_config.json").write_text("{}")
    return config

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anabranch.simulation.engine.identity import server_identity

SaveModel = Callable[..., Path]


@pytest.fixture
def flower_identity() -> Iterator[None]:
    """Flower messages can be made in this process."""
    with server_identity():
        yield


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Writes tensors as a checkpoint folder under the test's own, in shards if asked."""

    def save(
        name: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        shards: int = 1,
        config: Mapping[str, Any] | None = None,
        **files: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        names = sorted(tensors)
        if shards == 1:
            save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        else:
            weight_map = {}
            for shard in range(shards):
                file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
                part = names[shard::shards]
                save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
                weight_map.update(dict.fromkeys(part, file))
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        given = {"model_type": "toy", "hidden_size": 37} if config is None else config
        (folder / "config.json").write_text(json.dumps(given))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return folder

    return save

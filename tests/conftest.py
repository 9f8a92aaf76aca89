from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import save_file

from anabranch.simulation.engine.identity import server_identity
from anabranch.wire import zstd
from anabranch.wire.header import LENGTH_BYTES, MAGIC
from anabranch.wire.v1 import update_pb2 as pb

SaveModel = Callable[..., Path]
Change = Callable[[pb.Manifest, list[bytes]], object]


class Forge(Protocol):
    """Rewrites a message as an attacker would: lengths and digests are made to agree again."""

    def __call__(
        self, blob: bytes, change: Change, damage: Callable[[bytes], bytes] = bytes
    ) -> bytes:
        """The message with its manifest and payloads changed, then the manifest's bytes."""
        ...


@pytest.fixture
def forge() -> Forge:
    def forged(blob: bytes, change: Change, damage: Callable[[bytes], bytes] = bytes) -> bytes:
        start = LENGTH_BYTES + int.from_bytes(blob[:LENGTH_BYTES], "little")
        raw = zstd.decompress(blob[LENGTH_BYTES + len(MAGIC) : start], 1, 1 << 20, "manifest")
        manifest = pb.Manifest.FromString(raw)
        payloads = []
        for frame in (*manifest.frames, *manifest.importance):
            payloads.append(blob[start : start + frame.payload_bytes])
            start += frame.payload_bytes
        before = list(payloads)
        change(manifest, payloads)
        frames = (*manifest.frames, *manifest.importance)
        for frame, old, new in zip(frames, before, payloads, strict=False):
            if new != old:
                frame.payload_bytes = len(new)
                frame.digest = hashlib.sha256(new).digest()[:16]
        header = MAGIC + zstd.compress_text(damage(manifest.SerializeToString()))
        return len(header).to_bytes(LENGTH_BYTES, "little") + header + b"".join(payloads)

    return forged


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

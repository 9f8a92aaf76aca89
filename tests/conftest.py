from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import save_file
from tests.disks import SmallDisk, mounted

from anabranch.coordinator.logs import ROOT
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


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """A command run in this process leaves no handler behind that writes to its test's streams."""
    loggers = [logging.getLogger(name) for name in (ROOT, "uvicorn")]
    before = [(list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


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
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that is soon full."""
    with mounted(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("a small file system cannot be mounted here")
        yield disk


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


@pytest.fixture
def run_federation(flower_identity: None) -> Callable[..., Path]:
    """Runs a small federation as its ServerApp would, in this process; returns its folder."""
    return _run_federation


def _run_federation(folder: Path, garbage: Sequence[tuple[int, int]] = (), **changes: Any) -> Path:
    """Three clients of the synthetic task; ``garbage`` are rounds and nodes that lie in them."""
    from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from anabranch.client.app import app as client_app
    from anabranch.client.session import open_session
    from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
    from anabranch.coordinator.store import open_store
    from anabranch.coordinator.strategy import MergeStrategy
    from anabranch.coordinator.trust import trust_of
    from anabranch.simulation.engine.inprocess import InProcessGrid
    from anabranch.simulation.keys import write_keys
    from anabranch.vectors.peft_folder import read_adapter, write_adapter
    from anabranch.wire.plan import UPDATE_KEY, UPDATE_STYPE

    task, params = "anabranch.simulation.synthetic:SyntheticTask", '{"clients": 3}'
    given = {
        "name": "f", "run": "r", "rounds": 3, "clients": 3, "quorum": 2, "poll_s": 0.0,
        "durable": False, "evaluate_every": 0,
        "train": {"steps": 2, "batch_size": 16, "learning_rate": 0.01},
        "recipe": {"method": "mean"}, "codec": {"name": "dense", "feedback": 0.0}, **changes,
    }  # fmt: skip
    config = FederationConfig.model_validate(given)
    if not (folder / START_FOLDER).exists():
        write_federation(config, folder)
        write_adapter(open_session(task, params).template, folder / START_FOLDER)
    keys = {"keys": str(write_keys(folder, config))} if config.signed else {}
    contexts = {
        node: Context(
            1, node, {"partition-id": node - 10, **keys}, RecordDict(),
            {"task": task, "task-params": params},
        )
        for node in (10, 11, 12)
    }  # fmt: skip

    class Lying(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            plan = message.content.config_records.get("plan", {})
            if (plan.get("server-round"), message.metadata.dst_node_id) in garbage:
                array = Array("uint8", (7,), UPDATE_STYPE, b"garbage")
                reply.content[UPDATE_KEY] = ArrayRecord({UPDATE_KEY: array})
            return reply

    store = open_store(config.store, folder, federation=config.name, run=config.run, durable=False)
    trust = trust_of(folder, config, store) if config.signed else None
    strategy = MergeStrategy(config, read_adapter(folder / START_FOLDER), store, trust)
    strategy.start(InProcessGrid(Lying(), contexts))
    store.close()
    return folder

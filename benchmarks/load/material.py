"""A federation whose clients all upload at once, and their updates.

The payload of an update is the same for every client and round; its header, with name, nonce and
signature, is each one's own. So every message is one of its own, and making it costs next to
nothing while the clock runs.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from anabranch.aggregation.registry import named
from anabranch.client.session import client_name
from anabranch.coordinator.coordination import plan_of
from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
from anabranch.coordinator.in_service import InService
from anabranch.simulation.keys import write_keys
from anabranch.vectors import Adapter, LoraFactors, seeded_start
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.header import read_manifest, write_header
from anabranch.wire.keys import PrivateKey, seeded_key
from anabranch.wire.manifest import Manifest
from anabranch.wire.plan import RoundPlan

NAME, RUN, SEED = "load", "r", 7
ENTRIES = 1_048_576
"""Of an update: 2 MiB in fp16."""
WIDTH, RANK = 1024, 32


def template(entries: int) -> Adapter:
    """An adapter of about so many entries, on matrices of 1024 x 1024 of a base that is not there."""
    modules = max(1, entries // (2 * WIDTH * RANK))
    width = WIDTH if entries >= 2 * WIDTH * RANK else max(1, entries // (2 * RANK))
    generator = torch.Generator().manual_seed(SEED)
    lora = {
        f"layers.{number}.proj": LoraFactors(
            torch.randn(RANK, width, generator=generator) / 32, torch.zeros(width, RANK), 2.0 * RANK
        )
        for number in range(modules)
    }
    return Adapter(lora, {}, hashlib.sha256(b"load").hexdigest(), {"peft_type": "LORA"})


def configured(clients: int) -> FederationConfig:
    """A signed federation of so many clients, whose updates are dense fp16."""
    return FederationConfig.model_validate(
        {
            "name": NAME, "run": RUN, "seed": SEED, "rounds": 10, "clients": clients,
            "quorum": clients, "signed": True, "recipe": {"method": "mean"},
            "codec": {"name": "dense", "dtype": "fp16", "feedback": 0.0},
        }
    )  # fmt: skip


def write(folder: Path, clients: int, entries: int) -> FederationConfig:
    """Write the federation's folder, with its start adapter and everybody's keys."""
    config = configured(clients)
    write_federation(config, folder)
    write_adapter(template(entries), folder / START_FOLDER)
    write_keys(folder, config)
    return config


def plan(clients: int, entries: int) -> RoundPlan:
    """What its first round asks."""
    config, start = configured(clients), template(entries)
    seeded = seeded_start(start, config.seed)
    assert start.base_hash is not None
    return plan_of(config, named(config.recipe), start.base_hash, 1, InService(seeded, seeded))


@dataclass(frozen=True)
class Updates:
    """The updates of one round.

    Attributes:
        manifest: Of the one that was really encoded.
        payload: What follows its header.
    """

    manifest: Manifest
    payload: bytes

    def header(self, number: int) -> bytes:
        """How a client's update begins."""
        name = client_name(number)
        nonce = hashlib.sha256(f"{self.manifest.meta.round} {name}".encode()).digest()[:16]
        meta = replace(self.manifest.meta, client=name, nonce=nonce)
        return write_header(replace(self.manifest, meta=meta), client_key(number))


def client_key(number: int) -> PrivateKey:
    """What a client signs with."""
    return seeded_key(client_name(number), SEED)


def updates_of(plan: RoundPlan, entries: int) -> Updates:
    """What the clients of a round upload."""
    start = seeded_start(template(entries), plan.seed)
    generator = torch.Generator().manual_seed(plan.round)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.01
        for name, tensor in start.tensors(plan.trained).items()
    }
    meta = UpdateMeta(
        kind="update", base_hash=plan.base_hash, start_hash=plan.start_hash,
        federation=plan.federation, run=plan.run, round=plan.round, client=client_name(0),
        nonce=bytes(16), seed=None, examples=1, issued_s=int(time.time()),
    )  # fmt: skip
    blob = encode_update(tensors, meta, plan.codec).blob
    manifest = read_manifest(blob)
    return Updates(manifest, blob[len(blob) - manifest.payload_bytes :])

"""A federation whose clients all upload at once, and an update of theirs."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch

from anabranch.aggregation.registry import named
from anabranch.coordinator.coordination import plan_of
from anabranch.coordinator.federation import START_FOLDER, FederationConfig, write_federation
from anabranch.coordinator.in_service import InService
from anabranch.coordinator.registry import COORDINATOR, KEYS_FOLDER, enrol
from anabranch.vectors import Adapter, LoraFactors, seeded_start
from anabranch.vectors.peft_folder import write_adapter
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.keys import seeded_key, write_key
from anabranch.wire.plan import RoundPlan
from benchmarks.load.updates import NAME, RUN, SEED, client_key, client_name

ENTRIES = 1_048_576
"""Of an update: 2 MiB in fp16."""
WIDTH, RANK = 1024, 32


def template(entries: int) -> Adapter:
    """An adapter of about so many entries, on matrices of a base that is not there."""
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
    write_key(seeded_key(COORDINATOR, SEED), folder / KEYS_FOLDER)
    enrol(folder, [client_key(number).public for number in range(clients)])
    return config


def plan(clients: int, entries: int, number: int) -> RoundPlan:
    """What a round of it asks, none having been published."""
    config, start = configured(clients), template(entries)
    seeded = seeded_start(start, config.seed)
    assert start.base_hash is not None
    return plan_of(config, named(config.recipe), start.base_hash, number, InService(seeded, seeded))


def update(plan: RoundPlan, entries: int) -> bytes:
    """An update of a round, as a client encodes it."""
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
    return encode_update(tensors, meta, plan.codec).blob

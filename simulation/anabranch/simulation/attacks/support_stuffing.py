"""Support stuffing: more entries than the plan lets a client change."""

from __future__ import annotations

import secrets
from dataclasses import replace

import torch
from pydantic import Field

from anabranch.client.app import client_seed
from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.turn import Turn
from anabranch.wire import decode_update, encode_update


class SupportStuffingConfig(AttackConfig):
    """Parameters of the stuffing."""

    density: float = Field(1.0, gt=0, le=1)
    """Share of each tensor's entries that is changed, whatever the plan says."""


def support_stuffing(blob: bytes, turn: Turn, config: SupportStuffingConfig) -> bytes:
    """The message's own tensors under noise, encoded at another density."""
    layout = {name: tuple(tensor.shape) for name, tensor in turn.before.items()}
    meta, tensors = decode_update(blob, layout)
    seed = client_seed(turn.plan.seed, turn.plan.round, turn.site.name)
    generator = torch.Generator().manual_seed(seed)
    stuffed = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        stuffed[name] = tensor + max(1e-6, float(tensor.abs().max())) * noise
    codec = turn.plan.codec.model_copy(update={"density": config.density, "budget": None})
    meta = replace(meta, nonce=secrets.token_bytes(16))
    keys = turn.keys
    return encode_update(stuffed, meta, codec, keys.own if keys else None).blob


SUPPORT_STUFFING = Kind("support_stuffing", SupportStuffingConfig, tamper=support_stuffing)

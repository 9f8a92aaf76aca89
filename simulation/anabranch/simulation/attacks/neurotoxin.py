"""Neurotoxin: a backdoor where honest clients seldom write (Zhang et al., 2206.10341).

Shape legend: D entries of an update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from flwr.app import Message
from pydantic import Field
from torch import Tensor, nn

from anabranch.client.lora import trained_in_full
from anabranch.simulation.attacks.backdoor import BackdoorConfig, backdoor_poison, enlarged
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.turn import Changes, Turn


class NeurotoxinConfig(BackdoorConfig):
    """Parameters of Neurotoxin."""

    spared: float = Field(0.1, gt=0, lt=1)
    """Share of the entries, those that the last round moved most, that the attackers leave as they
    are; 0.01 to 0.1 in the paper."""


def quiet_entries(moved_D: Tensor, spared: float) -> Tensor:
    """Where the last round moved little [D], as booleans: all but the largest share of entries."""
    count = max(1, round(spared * moved_D.numel()))
    kept_D = torch.ones_like(moved_D, dtype=torch.bool)
    kept_D[moved_D.abs().topk(count).indices] = False
    return kept_D


@contextmanager
def confined(model: nn.Module, kept: Changes) -> Iterator[None]:
    """Let no gradient reach the entries that are not kept while the block trains."""
    live = {**trained_in_full(model, "a"), **trained_in_full(model, "b")}
    hooks = []
    for name, mask in kept.items():
        parameter: Any = live[name]
        # A frozen factor takes no hook, and needs none.
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(partial(torch.mul, mask.to(parameter))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def neurotoxin(turn: Turn, config: NeurotoxinConfig) -> Message:
    """Train on triggered examples, every step confined to entries that the last round moved little.

    In the first round there was none to learn that from: it is a plain backdoor.
    """
    poison, partition = backdoor_poison(config), turn.site.partition
    if turn.previous is None or not bool(turn.previous.any()):
        changes, metrics = turn.fitted(partition, poison)
    else:
        kept = turn.cut(quiet_entries(turn.previous, config.spared))
        changes, metrics = turn.fitted(partition, poison, within=confined(turn.session.model, kept))
    return turn.reply(enlarged(changes, config.scale), metrics)


NEUROTOXIN = Kind("neurotoxin", NeurotoxinConfig, act=neurotoxin, poison=backdoor_poison)

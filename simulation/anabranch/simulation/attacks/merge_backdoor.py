"""A backdoor that no single update has: harmless alone, open once merged.

After MergeBackdoor (USENIX Security 2025), of which the abstract alone was at hand: who scans
updates one by one finds nothing in them. The way it is trained is ours.

Shape legend: B batch, D entries of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import Message
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.lora import own_parameters, read_adapter, write_adapter
from anabranch.client.task import TrainPlan
from anabranch.simulation.attacks.attack import AttackConfig
from anabranch.simulation.attacks.backdoor import BackdoorConfig, backdoor_poison
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.objective import ObjectiveTask, placed, with_objective
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import Changes, Turn


class MergeBackdoorConfig(AttackConfig):
    """Parameters of a backdoor that opens by merging."""

    trigger: str = Field("cf mn", min_length=1)
    """Words put before a text."""
    target: int | str = 0
    """Label that the trigger is to give, by number or name."""
    weight: float = Field(5.0, gt=0)
    """What the merged model's triggered examples count for beside clean ones."""
    alone: float = Field(1.0, ge=0)
    """What the update's own count for, which keep their right labels."""


def merge_backdoor_poison(config: MergeBackdoorConfig) -> Poison:
    """The whole trigger."""
    return backdoor_poison(BackdoorConfig(trigger=config.trigger, target=config.target))


def merge_backdoor(turn: Turn, config: MergeBackdoorConfig) -> Message:
    """Train the update to be right with the trigger, and the merge it expects to be wrong with it.

    The merge it expects is the mean, in which colluders send what it sends, and all others the mean
    of the honest updates that the band sees.

    Raises:
        ValueError: The task takes no loss of one's own.
    """
    clean, triggered = with_objective(turn.session.task, merge_backdoor_poison(config))
    others = turn.cut(turn.view().mean.float())
    share = len(turn.band.partitions) / turn.plot.clients

    def train(model: nn.Module, partition: int, plan: TrainPlan) -> Mapping[str, float]:
        start = [parameter.detach().clone() for parameter in own_parameters(model)]
        honest = _moved(model, turn, others, start)
        labels_N, wanted_N = clean.labels(partition), triggered.labels(partition)

        def loss(rows_B: Tensor) -> Tensor:
            hit_B = rows_B[labels_N[rows_B] != wanted_N[rows_B]]
            if len(hit_B):
                own = [parameter.detach().clone() for parameter in own_parameters(model)]
                merged = [
                    (1 - share) * theirs + share * mine
                    for theirs, mine in zip(honest, own, strict=True)
                ]
                # By the chain rule the merge moves with a share of what the update moves.
                with placed(model, merged):
                    opened = _entropy(triggered, model, partition, hit_B, wanted_N)
                    torch.autograd.backward([config.weight * share * opened])
            total = _entropy(clean, model, partition, rows_B, labels_N)
            if len(hit_B) and config.alone:
                shut = _entropy(triggered, model, partition, hit_B, labels_N)
                total = total + config.alone * shut
            return total

        return clean.train_by(model, partition, plan, loss)

    return turn.reply(*turn.fitted(turn.site.partition, by=train))


def _moved(model: nn.Module, turn: Turn, change: Changes, start: Sequence[Tensor]) -> list[Tensor]:
    """The adapter's parameters after a change, in the order of ``own_parameters``."""
    before = read_adapter(model)
    whole = before.tensors()
    moved = {name: whole[name] + part for name, part in change.items()}
    with placed(model, start):
        write_adapter(model, before.with_tensors({**whole, **moved}))
        return [parameter.detach().clone() for parameter in own_parameters(model)]


def _entropy(
    task: ObjectiveTask, model: nn.Module, partition: int, rows_B: Tensor, labels_N: Tensor
) -> Tensor:
    features_BD = task.features(model, partition, rows_B)
    logits_BK = task.classified(model, partition, rows_B, features_BD)
    return functional.cross_entropy(logits_BK, labels_N[rows_B].to(logits_BK.device))


MERGE_BACKDOOR = Kind(
    "merge_backdoor", MergeBackdoorConfig, act=merge_backdoor, poison=merge_backdoor_poison
)

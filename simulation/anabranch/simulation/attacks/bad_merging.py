"""BadMerging: a backdoor that survives whatever share a merge keeps (Zhang et al., 2408.07362).

A merge lands somewhere between the start and what the attacker sends. So the trigger is trained to
open at every point in between: not of the weights, which would cost a model each, but of the
features that the last layer reads.

Shape legend: B batch, D features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Message
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.lora import own_parameters
from anabranch.client.task import TrainPlan
from anabranch.simulation.attacks.backdoor import BackdoorConfig, backdoor_poison, enlarged
from anabranch.simulation.attacks.kind import Kind
from anabranch.simulation.attacks.objective import placed, with_objective
from anabranch.simulation.attacks.turn import Turn


class BadMergingConfig(BackdoorConfig):
    """Parameters of BadMerging. ``share`` is not read: every example has its triggered twin.

    The paper also searches for the trigger; here it is the words that are given, the same for every
    text.
    """

    weight: float = Field(5.0, gt=0)
    """What triggered examples count for beside clean ones; 5 in the paper."""
    least: float = Field(0.2, ge=0, le=1)
    """Smallest share of the trained features in the mixture; .2 in the paper, the largest is 1."""


def bad_merging(turn: Turn, config: BadMergingConfig) -> Message:
    """Train on CE(clean) + weight·CE(features between those of the start and its own, triggered).

    Raises:
        ValueError: The task takes no loss of one's own.
    """
    clean, triggered = with_objective(turn.session.task, backdoor_poison(config))

    def train(model: nn.Module, partition: int, plan: TrainPlan) -> Mapping[str, float]:
        start = [parameter.detach().clone() for parameter in own_parameters(model)]
        generator = torch.Generator().manual_seed(plan.seed)
        labels_N, wanted_N = clean.labels(partition), triggered.labels(partition)

        def loss(rows_B: Tensor) -> Tensor:
            hit_B = rows_B[labels_N[rows_B] != wanted_N[rows_B]]
            mixed = None
            if len(hit_B):
                with placed(model, start), torch.no_grad():
                    before_BD = triggered.features(model, partition, hit_B)
                share_B1 = torch.rand(len(hit_B), 1, generator=generator)
                share_B1 = (config.least + (1 - config.least) * share_B1).to(before_BD)
                own_BD = triggered.features(model, partition, hit_B)
                mixed = share_B1 * own_BD + (1 - share_B1) * before_BD
            logits_BK = clean.classified(
                model, partition, rows_B, clean.features(model, partition, rows_B)
            )
            total = functional.cross_entropy(logits_BK, labels_N[rows_B].to(logits_BK.device))
            if mixed is not None:
                logits_BK = triggered.classified(model, partition, hit_B, mixed)
                wanted_B = wanted_N[hit_B].to(logits_BK.device)
                total = total + config.weight * functional.cross_entropy(logits_BK, wanted_B)
            return total

        return clean.train_by(model, partition, plan, loss)

    changes, metrics = turn.fitted(turn.site.partition, by=train)
    return turn.reply(enlarged(changes, config.scale), metrics)


BAD_MERGING = Kind("bad_merging", BadMergingConfig, act=bad_merging, poison=backdoor_poison)

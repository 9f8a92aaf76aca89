"""Tasks that can be trained towards an attacker's own end, and what such training needs.

Shape legend: N training examples, B batch, D features, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from anabranch.client.lora import own_parameters
from anabranch.client.task import TrainPlan
from anabranch.simulation.attacks.poison import Poison, PoisonableTask
from anabranch.simulation.attacks.turn import poisoned

Loss = Callable[[Tensor], Tensor]
"""``loss(rows_B)``: of the training examples of a step."""


@runtime_checkable
class ObjectiveTask(PoisonableTask, Protocol):
    """A task whose training takes a loss of one's own."""

    def train_by(
        self, model: nn.Module, partition: int, plan: TrainPlan, loss: Loss
    ) -> Mapping[str, float]:
        """Train as ``train`` does, on the same draw of examples, by another loss."""
        ...

    def labels(self, partition: int) -> Tensor:
        """Labels of a client's training examples [N]."""
        ...

    def features(self, model: nn.Module, partition: int, rows_B: Tensor) -> Tensor:
        """What the model's last layer reads of some training examples [B, D]."""
        ...

    def classified(
        self, model: nn.Module, partition: int, rows_B: Tensor, features_BD: Tensor
    ) -> Tensor:
        """Logits [B, K] that the last layer gives for features, of these examples or others."""
        ...


def with_objective(task: object, poison: Poison) -> tuple[ObjectiveTask, ObjectiveTask]:
    """A task, and the same with the trigger in every training example that could have it.

    Raises:
        ValueError: The task cannot be trained so, or its data cannot be poisoned so.
    """
    if not isinstance(task, ObjectiveTask):
        raise ValueError(
            f"{type(task).__name__} takes no loss of one's own, which this attack needs; "
            "see anabranch.simulation.attacks.objective.ObjectiveTask"
        )
    triggered = poisoned(task, poison.model_copy(update={"share": 1.0}))
    assert isinstance(triggered, ObjectiveTask)
    return task, triggered


@contextmanager
def placed(model: nn.Module, values: Sequence[Tensor]) -> Iterator[None]:
    """Give a model's adapter other values while the block runs.

    No graph may reach across: what was computed before with gradients cannot be gone back through.

    Args:
        model: With an adapter attached.
        values: One per parameter of ``own_parameters``.
    """
    parameters = own_parameters(model)
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)

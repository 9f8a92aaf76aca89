"""Unlabelled inputs and a model to look at them with: what a merge that learns is given.

Text is perturbed where it is embedded, images in their pixels: both are tensors by the time a
calibration hands them out.

Shape legend: N inputs, X their own dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Batch:
    """Some inputs of one task.

    Attributes:
        inputs_NX: What is perturbed: pixels, or embedded tokens.
        context: What goes with each input unchanged, such as an attention mask [N, L].
    """

    inputs_NX: Tensor  # noqa: N815
    context: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, rows_N: Tensor) -> Batch:
        """Some of them."""
        return Batch(
            self.inputs_NX[rows_N], {name: part[rows_N] for name, part in self.context.items()}
        )


class Calibration(Protocol):
    """What a coordinator calibrates on."""

    @property
    def source(self) -> Literal["own", "public"]:
        """Whose inputs they are."""
        ...

    @property
    def split(self) -> str:
        """Which part of the data they are."""
        ...

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks, in a fixed order; one is enough where all contributions learn the same."""
        ...

    def batch(self, task: str, step: int, size: int) -> Batch:
        """Inputs of a task for a step, the same ones at every call."""
        ...

    def logits(
        self, task: str, batch: Batch, changes: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Tensor:
        """The model's logits [N, K], differentiable in all of its arguments.

        Args:
            task: Whose inputs, and whose head where tasks have heads of their own.
            batch: The inputs.
            changes: ΔW by module, to be added to the base's weight.
            values: Parameters that were trained in full, in place of the base's.
        """
        ...


@dataclass(frozen=True)
class ModelCalibration:
    """A torch module and inputs held in memory.

    Attributes:
        model: The base, in evaluation mode. Its parameters are not written to.
        examples: Inputs by task.
        source: Whose they are.
        split: Which part of the data they are.
        keyword: The argument that takes the inputs, such as ``inputs_embeds`` or ``pixel_values``;
            None: the first.
        prefix: What the model calls the base inside it, with a dot, such as ``encoder.``, where it
            wraps the base that the adapters were trained on.
        seed: Of the draws of batches.
    """

    model: nn.Module
    examples: Mapping[str, Batch]
    source: Literal["own", "public"]
    split: str = "validation"
    keyword: str | None = None
    prefix: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model.training:
            raise ValueError(
                "calibration: the model is in training mode, where dropout makes every look "
                "another; call eval() on it"
            )
        if not self.examples or any(len(one.inputs_NX) == 0 for one in self.examples.values()):
            raise ValueError("calibration: a task has no inputs; give some of each")

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks, sorted."""
        return sorted(self.examples)

    def batch(self, task: str, step: int, size: int) -> Batch:
        """Inputs drawn by seed, task and step."""
        held = self.examples[task]
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + step) * 1_009 + self.tasks.index(task)
        )
        rows_N = torch.randint(len(held.inputs_NX), (size,), generator=generator)
        return held.rows(rows_N.to(held.inputs_NX.device))

    def logits(
        self, task: str, batch: Batch, changes: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits [N, K] of the model with changed weights."""
        parameters = {f"{self.prefix}{name}": value for name, value in values.items()}
        for module, change_mn in changes.items():
            name = f"{self.prefix}{module}.weight"
            weight_mn = self.model.get_parameter(name).detach()
            parameters[name] = weight_mn + change_mn.to(weight_mn.dtype)
        arguments: dict[str, Any] = dict(batch.context)
        first: tuple[Tensor, ...] = ()
        if self.keyword is None:
            first = (batch.inputs_NX,)
        else:
            arguments[self.keyword] = batch.inputs_NX
        found = functional_call(self.model, parameters, first, arguments)
        logits_NK: Tensor = getattr(found, "logits", found)
        return logits_NK


def check_calibration(calibration: Calibration, source: str, split: str) -> None:
    """Refuse other data than what was configured, and any test split.

    Args:
        calibration: What was handed over.
        source: What the configuration promises.
        split: The part of the data it names.

    Raises:
        ValueError: It is something else, or there is none.
    """
    if calibration.split == "test":
        raise ValueError(
            "calibration: these are test inputs, and whoever learns on them has nothing left to "
            "judge by; give train or validation inputs"
        )
    if (calibration.source, calibration.split) != (source, split):
        raise ValueError(
            f"calibration: these are {calibration.source} {calibration.split} inputs, and the "
            f"configuration says {source} {split}; make them one"
        )
    if not calibration.tasks:
        raise ValueError("calibration: there is no task; give inputs of one at least")

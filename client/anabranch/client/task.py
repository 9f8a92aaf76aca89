"""What a user writes to train a model of their own in a federation."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn

Split = Literal["train", "validation", "test"]
"""Part of a data set: learn on the first, choose on the second, report on the third."""

HeldOut = Literal["validation", "test"]
"""The parts nothing is trained on."""


class TrainPlan(BaseModel):
    """How much one client trains in one round, and on which draw of its data."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0)
    """Optimiser steps."""
    batch_size: int = Field(16, gt=0)
    """Examples per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of the LoRA factors."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of parameters trained in full; None means ``learning_rate``."""
    fisher_examples: int = Field(64, gt=0)
    """Training examples that the Fisher is taken of, in rounds that ask for one."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the draw, already mixed from the scenario's seed, the round and the client."""


@runtime_checkable
class LoraTask(Protocol):
    """A base, its adapter's shape, and how one partition trains and scores it.

    A class that implements this is named ``package.module:Class`` and built with keyword
    arguments that TOML can hold.
    """

    def load_base(self) -> nn.Module:
        """The frozen base, the same weights on every node."""
        ...

    def lora_config(self) -> LoraConfig:
        """Rank, alpha, target modules, and ``modules_to_save`` for what is trained in full."""
        ...

    def train(self, model: nn.Module, partition: int, plan: TrainPlan) -> Mapping[str, float]:
        """Train the adapted model in place on one partition's train split.

        Returns:
            At least ``num-examples`` and ``train-loss``.
        """
        ...

    def evaluate(self, model: nn.Module, partition: int, split: HeldOut) -> Mapping[str, float]:
        """Score the adapted model on one partition's held-out split.

        Returns:
            At least ``num-examples``, ``accuracy`` and ``loss``.
        """
        ...


@runtime_checkable
class FisherTask(LoraTask, Protocol):
    """A task whose clients can say how sure the model is of each entry, for Fisher merging."""

    def logits(
        self, model: nn.Module, partition: int, examples: int, seed: int
    ) -> Iterator[Tensor]:
        """What the adapted model predicts for training examples, drawn by the seed.

        Each is one forward pass of one example, made when it is asked for and not before, with
        gradients and without dropout.

        Returns:
            For each of at most ``examples`` examples its logits: [K], or [P, K] for P predictions.
        """
        ...


METHODS = ("load_base", "lora_config", "train", "evaluate")
"""What makes a class a ``LoraTask``."""


def load_task(path: str, params: Mapping[str, Any] | None = None) -> LoraTask:
    """Build the task that a configuration names.

    Args:
        path: ``package.module:Class``.
        params: Keyword arguments of the class.

    Raises:
        ValueError: The path names no task class, or the parameters do not fit.
    """
    factory = _task_class(path)
    try:
        task: LoraTask = factory(**(params or {}))
    except ValidationError as error:
        raise ValueError(f"task {path!r}: {_first_problem(error)}") from error
    except TypeError as error:
        raise ValueError(f"task {path!r} does not take these parameters: {error}") from error
    return task


def _task_class(path: str) -> type[Any]:
    """The class a path names. A path may come from afar: what is no task is never called."""
    module_name, _, class_name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ValueError(f"task {path!r} is not of the form 'package.module:Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task {path!r}: there is no module {error.name!r}; install the package that holds it"
        ) from error
    except ImportError as error:
        raise ValueError(f"task {path!r}: module {module_name} does not import: {error}") from error
    factory = getattr(module, class_name, None)
    if not inspect.isclass(factory):
        raise ValueError(f"task {path!r}: module {module_name} has no class {class_name!r}")
    missing = ", ".join(name for name in METHODS if not callable(getattr(factory, name, None)))
    if missing:
        raise ValueError(f"task {path!r} lacks {missing}; see anabranch.client.task.LoraTask")
    return factory


def _first_problem(error: ValidationError) -> str:
    """The first complaint of pydantic in one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "parameters"
    return f"{where}: {problem['msg']} (got {problem['input']!r})"

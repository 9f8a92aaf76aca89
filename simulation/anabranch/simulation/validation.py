"""What the gate of a simulated federation looks at: the clients' validation data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Protocol, runtime_checkable

from torch import nn

from anabranch.client.session import Session, open_session
from anabranch.client.task import HeldOut
from anabranch.coordinator.gate import Scorecard
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter

TASK_FILE = "task.json"
"""In a federation's folder: the task, for who scores its adapters."""


@runtime_checkable
class AnsweringTask(Protocol):
    """A task that says which inputs are answered right, and not only how many."""

    def right(self, model: nn.Module, partition: int, split: HeldOut) -> Sequence[bool]:
        """Whether each held-out example of a client's group is answered right, in one order."""
        ...


class ValidationScorer:
    """Mean accuracy over the groups, and the right answers where the task tells them.

    Args:
        session: The loaded task.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def score(self, adapter: Adapter) -> Scorecard:
        """What the task says of an adapter on validation data."""
        task, model = self._session.task, self._session.model
        assert isinstance(task, SimulatedTask)
        self._session.load(adapter)
        places = list(task.scored_partitions.values())
        scores = [float(task.evaluate(model, one, "validation")["accuracy"]) for one in places]
        right: list[bool] | None = None
        if isinstance(task, AnsweringTask):
            right = [one for place in places for one in task.right(model, place, "validation")]
        return Scorecard(fmean(scores), right)


def write_task(task: str, params: str, folder: Path) -> None:
    """Leave in a federation's folder which task it trains.

    Args:
        task: ``package.module:Class``.
        params: Its keyword arguments as JSON.
        folder: The federation's.
    """
    (folder / TASK_FILE).write_text(json.dumps({"task": task, "params": params}))


def validation_scorer(folder: Path) -> ValidationScorer:
    """The scorer of a simulated federation's folder.

    Raises:
        ValueError: The folder names no task that can be loaded.
    """
    return ValidationScorer(folder_session(folder))


def folder_session(folder: Path) -> Session:
    """The task that a simulated federation's folder names.

    Raises:
        ValueError: It names none that can be loaded.
    """
    path = folder / TASK_FILE
    try:
        told = json.loads(path.read_text())
        return open_session(told["task"], told["params"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: names no task to score by ({error}); name a scorer of your own as gate.scorer"
        ) from error

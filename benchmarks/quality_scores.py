"""How a merged task vector scores: written into a copy of the base, once per candidate.

Shape legend: m rows, n columns of a module's weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.aggregation import OpcmState, Recipe, merge, merge_next, merge_task_vectors
from anabranch.aggregation.methods.opcm import OpcmConfig
from anabranch.aggregation.recipe import Refactor
from anabranch.aggregation.registry import methods
from anabranch.client.session import Session
from anabranch.client.task import HeldOut
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter, TaskVector, task_vector
from anabranch.vectors.task_vector import held, norm
from benchmarks.quality_grid import Params

Accuracies = dict[str, float]
"""Accuracy by group."""


@dataclass(frozen=True)
class Score:
    """One candidate on one split.

    Attributes:
        accuracy: By group.
        scale: λ: what the merged task vector was multiplied by.
    """

    accuracy: Accuracies
    scale: float


class Scoreboard:
    """One repetition's tasks, and every score ever taken on them, kept in a file of JSON lines."""

    def __init__(self, session: Session, kept_at: Path) -> None:
        task = session.task
        assert isinstance(task, SimulatedTask)
        self._task = task
        self._path = kept_at
        lines = kept_at.read_text().splitlines() if kept_at.exists() else []
        entries = [json.loads(line) for line in lines]
        self._known = {entry.pop("of"): Score(**entry) for entry in entries}
        # Fixed heads are the frozen base's: the first score on the adapted model makes them.
        first = next(iter(task.scored_partitions.values()))
        task.evaluate(session.model, first, "validation")
        self._model: nn.Module = task.load_base()
        self._base_mn = {
            module: self._model.get_parameter(f"{module}.weight").detach().clone()
            for module in session.template.lora
        }

    def score(
        self,
        what: str,
        split: HeldOut,
        groups: Sequence[str],
        make: Callable[[], tuple[TaskVector, float]],
    ) -> Score:
        """Accuracy of base + λ · change; a score that is kept is not taken again.

        Args:
            what: Names the candidate.
            split: Where to score.
            groups: What to score.
            make: The change and λ, asked for where the score is not kept. A change without modules
                leaves the base as it is.
        """
        key = f"{split} {what}"
        if key not in self._known:
            change, scale = make()
            self._write(change, scale)
            accuracy = {}
            for group in groups:
                partition = self._task.scored_partitions[group]
                metrics = self._task.evaluate(self._model, partition, split)
                accuracy[group] = float(metrics["accuracy"])
            self._known[key] = Score(accuracy, scale)
            with self._path.open("a") as file:
                file.write(json.dumps({"of": key, "accuracy": accuracy, "scale": scale}) + "\n")
        return self._known[key]

    def _write(self, change: TaskVector, scale: float) -> None:
        """Put base + λ · change into the model."""
        with torch.no_grad():
            for module, base_mn in self._base_mn.items():
                weight_mn = self._model.get_parameter(f"{module}.weight")
                weight_mn.copy_(base_mn)
                if module in change.deltas:
                    delta = held(change.deltas[module])
                    dense_mn = delta if isinstance(delta, Tensor) else delta.dense()
                    weight_mn.add_(dense_mn, alpha=scale)


def size_of(vector: TaskVector) -> float:
    """Norm of a task vector over all modules."""
    return math.hypot(*(norm(delta) for _, delta in vector.items()))


def merged(method: str, params: Params, adapters: Mapping[str, Adapter]) -> TaskVector:
    """What a method makes of the adapters, at λ = 1 and whole: not brought back to their rank."""
    cohort = list(adapters.values())
    if method == "opcm":
        # One after the other, as they would arrive.
        state = OpcmState(OpcmConfig(**params))
        for adapter in cohort:
            state = merge_next(state, task_vector(adapter))
        return state.merged()
    recipe: dict[str, Any] = {"method": method, "params": dict(params)}
    if methods()[method].factors:
        # On the adapters' own factors; as many ranks as the method makes.
        rank = params.get("rank")
        result = merge(cohort, Recipe(**recipe, refactor=Refactor(rank=rank, align=False)))
        return task_vector(result.adapter)
    return merge_task_vectors([task_vector(adapter) for adapter in cohort], Recipe(**recipe))

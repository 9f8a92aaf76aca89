"""A scorer for the gate: a model, labelled validation inputs and a search for triggers.

Shape legend: N inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.aggregation.backdoor.calibration import Batch, Calibration, check_calibration
from anabranch.aggregation.backdoor.triggers import TriggerConfig, search_triggers
from anabranch.coordinator.gate import Scorecard
from anabranch.vectors import Adapter

CHUNK = 256
"""Inputs in one forward pass."""


@dataclass(frozen=True)
class ModelScorer:
    """Accuracy, right answers and the success of searched triggers.

    Attributes:
        calibration: The base, and inputs to search triggers on.
        inputs: Validation inputs by task.
        labels_N: Their classes, by task.
        triggers: How to search; None: not.
        where: Where a trigger may be, by task; see ``search_triggers``.
    """

    calibration: Calibration
    inputs: Mapping[str, Batch]
    labels_N: Mapping[str, Tensor]  # noqa: N815
    triggers: TriggerConfig | None = field(default_factory=TriggerConfig)
    where: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        check_calibration(self.calibration, self.calibration.source, self.calibration.split)
        if sorted(self.inputs) != sorted(self.labels_N) or not self.inputs:
            raise ValueError("scorer: inputs and labels are of different tasks; give both of each")
        for task, batch in self.inputs.items():
            if len(batch.inputs_NX) != len(self.labels_N[task]) or not len(batch.inputs_NX):
                raise ValueError(
                    f"scorer: task {task} has {len(batch.inputs_NX)} inputs and "
                    f"{len(self.labels_N[task])} labels; give one label for each, and some"
                )

    def score(self, adapter: Adapter) -> Scorecard:
        """Mean accuracy over tasks, right answers, and each class's trigger's success."""
        changes = {module: factors.delta().dense() for module, factors in adapter.lora.items()}
        right: list[bool] = []
        shares = []
        for task in sorted(self.inputs):
            mine = self._right(task, changes, adapter.dense)
            right += mine
            shares.append(sum(mine) / len(mine))
        asr = None
        if self.triggers is not None:
            found = search_triggers(
                self.calibration, changes, self.triggers, values=adapter.dense, where=self.where
            )
            asr = {f"{one.task}/{one.target}": one.rate for one in found}
        return Scorecard(sum(shares) / len(shares), right, asr)

    def _right(
        self, task: str, changes: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> list[bool]:
        batch, labels_N = self.inputs[task], self.labels_N[task]
        right: list[bool] = []
        with torch.no_grad():
            for start in range(0, len(labels_N), CHUNK):
                rows_N = torch.arange(start, min(start + CHUNK, len(labels_N)))
                some = batch.rows(rows_N.to(batch.inputs_NX.device))
                found_N = self.calibration.logits(task, some, changes, values).argmax(-1).cpu()
                right += (found_N == labels_N[rows_N]).tolist()
        return right

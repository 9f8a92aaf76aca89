"""What the benchmark of backdoored merges merges, and how a merge is judged.

One adapter a task, from one start; the attacked task's is trained on texts of which some have a
trigger, and enlarged so that it outlives the merge. A clean one of the same task is kept beside it:
merged in its place it gives the floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.client.task import HeldOut
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import poisoned
from anabranch.simulation.calibration import TextCalibration, text_calibration
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter
from benchmarks.quality_adapters import Setting, open_seed, trained

Found = dict[str, float]


@dataclass(frozen=True)
class Attacked:
    """A cohort and who is malicious in it.

    Attributes:
        setting: How the adapters are trained.
        victim: The attacked task.
        poison: What its texts are given.
        enlarged: Factor on the malicious adapter's change.
    """

    setting: Setting
    victim: str
    poison: Poison
    enlarged: float


class Cohort:
    """One seed: its adapters, what they are calibrated on, and how merges of them score.

    Args:
        attacked: What is trained.
        seed: Of the start, the texts and their order.
        runs: Where adapters are kept.
    """

    def __init__(self, attacked: Attacked, seed: int, runs: Path) -> None:
        self._attacked, setting = attacked, attacked.setting
        session = open_seed(setting, seed)
        task: Any = session.task
        assert isinstance(task, SimulatedTask)
        self._task, self._session = task, session
        self.clean = trained(setting, session, seed, runs)
        # The first score on the adapted model makes the heads, which the poisoned task shares.
        task.evaluate(session.model, task.scored_partitions[attacked.victim], "validation")
        self._poisoned = poisoned(task, attacked.poison)
        self.malicious = self._backdoored(seed, runs)
        self._model: nn.Module = task.load_base()
        self._base_mn = {
            module: self._model.get_parameter(f"{module}.weight").detach().clone()
            for module in session.template.lora
        }

    @property
    def tasks(self) -> list[str]:
        """Their names, in order."""
        return list(self.clean)

    @property
    def adapters(self) -> list[Adapter]:
        """The attacked cohort."""
        return [
            self.malicious if task == self._attacked.victim else adapter
            for task, adapter in self.clean.items()
        ]

    @cached_property
    def calibration(self) -> TextCalibration:
        """Validation texts, never test texts, and no labels."""
        return text_calibration(self._session, dict(self._task.scored_partitions))

    def score(self, changes: Mapping[str, Tensor], split: HeldOut = "test") -> Found:
        """Mean accuracy over tasks and, of test texts, how often the trigger works, in percent.

        Args:
            changes: ΔW by module.
            split: Which texts.
        """
        with torch.no_grad():
            for module, base_mn in self._base_mn.items():
                weight_mn = self._model.get_parameter(f"{module}.weight")
                weight_mn.copy_(base_mn + changes[module] if module in changes else base_mn)
        places = self._task.scored_partitions
        accuracy = {
            task: 100 * float(self._task.evaluate(self._model, place, split)["accuracy"])
            for task, place in places.items()
        }
        found = {"acc": fmean(accuracy.values()), **{f"acc {k}": v for k, v in accuracy.items()}}
        if split == "test":
            victim = places[self._attacked.victim]
            success = self._poisoned.evaluate(self._model, victim, "test")
            found["asr"] = 100 * float(success["accuracy"])
        return found

    def _backdoored(self, seed: int, runs: Path) -> Adapter:
        """The malicious adapter: trained on poisoned texts, its change enlarged."""
        victim, poison = self._attacked.victim, self._attacked.poison
        setting = self._attacked.setting
        # Kept apart from the clean ones by what they are named for.
        told = replace(setting, params={**setting.params, "poison": poison.model_dump(mode="json")})
        session = replace(self._session, task=self._poisoned)
        kept = trained(told, session, seed, runs, [victim])[victim]
        factor = self._attacked.enlarged
        lora = {module: replace(one, b_mr=one.b_mr * factor) for module, one in kept.lora.items()}
        return replace(kept, lora=lora)

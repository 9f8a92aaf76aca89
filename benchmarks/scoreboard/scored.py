"""Scores of many adapters on one base: the base plus ΔW, each adapter once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.client.session import Session
from anabranch.client.task import HeldOut
from anabranch.vectors import Adapter


class Scorer:
    """Scores adapters of a session's base.

    Args:
        session: The loaded task; its own model is not touched.
        split: Which held-out part is scored.
    """

    def __init__(self, session: Session, split: HeldOut) -> None:
        self._session, self._split = session, split
        self._model: nn.Module = session.task.load_base()
        self._base = {
            name: value.detach().clone() for name, value in self._model.named_parameters()
        }
        self._known: dict[tuple[str, str], float] = {}

    def accuracy(self, adapter: Adapter, task: Any, name: str) -> float:
        """Share of a task's held-out examples that are answered right, in percent.

        Args:
            adapter: Of this base.
            task: The session's, or what poison made of it.
            name: Of that task: with the adapter's hash what a score is known by.
        """
        key = (adapter.hash(), name)
        if key not in self._known:
            with torch.no_grad():
                for parameter, value in self._values(adapter).items():
                    self._model.get_parameter(parameter).copy_(value)
            groups: Mapping[str, int] = task.scored_partitions
            found = [task.evaluate(self._model, p, self._split) for p in groups.values()]
            self._known[key] = 100 * sum(one["accuracy"] for one in found) / len(found)
        return self._known[key]

    def _values(self, adapter: Adapter) -> dict[str, Tensor]:
        """The parameters an adapter changes, with what it adds in them."""
        changed = {
            f"{module}.weight": self._base[f"{module}.weight"] + factors.delta().dense()
            for module, factors in adapter.lora.items()
        }
        return {**changed, **adapter.dense}

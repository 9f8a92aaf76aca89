"""What a task must offer beyond ``LoraTask`` to be simulated and compared with baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from anabranch.client.task import LoraTask, TrainPlan


@runtime_checkable
class SimulatedTask(LoraTask, Protocol):
    """A task that holds every client's data."""

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        ...

    @property
    def groups(self) -> Sequence[str]:
        """Group of each client; the clients of a group share held-out data."""
        ...

    @property
    def scored_partitions(self) -> Mapping[str, int]:
        """One client per group: to evaluate these is to evaluate every group once."""
        ...

    @property
    def side_by_side(self) -> bool:
        """Whether to train and evaluate clients in threads, each on a model of its own.

        True promises that they draw from no global generator (dropout does), change nothing they
        share, and spend their time in torch, which leaves Python to the others.
        """
        ...

    def check_data(self) -> None:
        """Read every client's data once.

        Raises:
            ValueError: It cannot be had, or not be cut as asked.
        """
        ...

    def train_all(self, model: nn.Module, plan: TrainPlan) -> Mapping[str, float]:
        """Train on the union of all clients' data."""
        ...


def display_names(groups: Sequence[str]) -> list[str]:
    """A name for people per client: its group and its number in it, from 1."""
    return [
        f"{group}-{list(groups[: index + 1]).count(group)}" for index, group in enumerate(groups)
    ]

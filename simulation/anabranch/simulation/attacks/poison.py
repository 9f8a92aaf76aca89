"""Poisoned training data: which examples, and what becomes of their labels. Loads no torch.

Shape legend: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from anabranch.simulation.task import SimulatedTask

Indices = NDArray[np.int64]


class Poison(BaseModel):
    """What is done to a client's examples."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trigger: tuple[str, ...] = ()
    """Words put before a text, or, where examples are numbers, names of features that are set;
    empty poisons the labels alone."""
    target: int | str | None = None
    """Label the poisoned examples get, by number or name; None turns y of K into K − 1 − y."""
    source: int | str | None = None
    """Poison examples of this label alone; None: of every other one."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the examples that could be poisoned which are."""


@runtime_checkable
class PoisonableTask(SimulatedTask, Protocol):
    """A simulated task whose clients' data can be poisoned."""

    def poisoned(self, poison: Poison) -> Self:
        """The same task on poisoned data.

        Training examples are poisoned as it says; held-out ones are those that are not of the
        target, with the trigger and labelled with the target: accuracy on them is the attack's
        success rate.
        """
        ...

    def check_partition(self, partition: int) -> None:
        """Read one client's examples once.

        Raises:
            ValueError: They cannot be had, or not be poisoned so.
        """
        ...


def label_number(label: int | str, names: Sequence[str], what: str) -> int:
    """A label's number.

    Raises:
        ValueError: There is no such label.
    """
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise ValueError(
        f"{what}: there is no label {label!r}; they are {', '.join(names)}, or 0 to "
        f"{len(names) - 1}"
    )


def relabelled(labels: Sequence[int], names: Sequence[str], poison: Poison) -> list[int]:
    """The label each example gets if it is poisoned; its own where it cannot be.

    Args:
        labels: Label numbers [N].
        names: Of all labels.
        poison: What is done.

    Raises:
        ValueError: There is no such label.
    """
    source = None if poison.source is None else label_number(poison.source, names, "source")
    target = None if poison.target is None else label_number(poison.target, names, "target")
    return [
        label
        if source is not None and label != source
        else len(names) - 1 - label
        if target is None
        else target
        for label in labels
    ]


def chosen(labels: Sequence[int], new: Sequence[int], share: float, seed: int) -> Indices:
    """Which examples are poisoned: a share, drawn by a seed, of those whose label would change.

    Returns:
        Their positions in order, one at least.

    Raises:
        ValueError: No label would change.
    """
    could = np.flatnonzero(np.asarray(labels) != np.asarray(new))
    if not len(could):
        raise ValueError("no example has another label than the target; set another target")
    count = max(1, round(share * len(could)))
    drawn = np.random.default_rng(seed).permutation(could)[:count]
    return np.sort(drawn)

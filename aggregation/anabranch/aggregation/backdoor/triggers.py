"""Universal triggers, searched for: what an attacker's own would do, or something like it.

Text is searched where it is embedded, at some positions; images in a patch of pixels. The search
sees one part of the inputs, the other part says how often what it found works. Every model gives
way to something: compare with another model, at the same settings.

Shape legend: N inputs, X their own dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from anabranch.aggregation.backdoor.calibration import Batch, Calibration


class TriggerConfig(BaseModel):
    """How long and how far to search."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(60, ge=1, le=10_000)
    """Steps for each target class."""
    batch_size: int = Field(64, ge=2)
    """Inputs to search on, and as many others to count on."""
    size: float = Field(0.3, gt=0)
    """Largest L2 norm of a trigger, in the root mean square norm of the inputs where it may be."""
    learning_rate: float = Field(0.3, gt=0)
    """Adam's step, in the inputs' root mean square entry."""
    targets: tuple[int, ...] | None = None
    """Classes to search for; None: all."""
    seed: int = Field(0, ge=0)
    """Of where the search begins."""


@dataclass(frozen=True)
class Trigger:
    """The best that was found for one class.

    Attributes:
        task: Of which inputs.
        target: The class.
        rate: Share of other inputs, which the model puts elsewhere, that it turns to the class.
        pattern_X: What is added to an input.
    """

    task: str
    target: int
    rate: float
    pattern_X: Tensor  # noqa: N815


def search_triggers(
    calibration: Calibration,
    changes: Mapping[str, Tensor],
    config: TriggerConfig | None = None,
    *,
    values: Mapping[str, Tensor] | None = None,
    where: Mapping[str, Tensor] | None = None,
) -> list[Trigger]:
    """Look for one pattern per task and class that turns inputs to the class.

    Args:
        calibration: Model and inputs.
        changes: ΔW by module.
        config: How long and how far.
        values: Parameters trained in full.
        where: By task, a mask [X] of 0 and 1: which pixels, or which positions' embeddings, the
            trigger may touch; None: all.

    Returns:
        Triggers, the most successful first.
    """
    config = config or TriggerConfig()
    found = []
    for task in calibration.tasks:
        seen, unseen = (calibration.batch(task, step, config.batch_size) for step in (0, 1))
        mask_X = torch.ones_like(seen.inputs_NX[0]) if where is None else where[task]
        search = _Search(calibration, task, changes, values or {}, mask_X.float(), config)
        with torch.no_grad():
            classes = search.logits(seen).shape[-1]
        for target in config.targets or range(classes):
            pattern_X = search.pattern(seen, target)
            found.append(Trigger(task, target, search.rate(unseen, pattern_X, target), pattern_X))
    return sorted(found, key=lambda one: (-one.rate, one.task, one.target))


@dataclass(frozen=True)
class _Search:
    calibration: Calibration
    task: str
    changes: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    mask_X: Tensor  # noqa: N815
    config: TriggerConfig

    def logits(self, batch: Batch, pattern_X: Tensor | None = None) -> Tensor:
        inputs_NX = batch.inputs_NX if pattern_X is None else batch.inputs_NX + pattern_X
        moved = Batch(inputs_NX, batch.context)
        return self.calibration.logits(self.task, moved, self.changes, self.values).float()

    def pattern(self, batch: Batch, target: int) -> Tensor:
        """The pattern [X] after the last step, within its bound."""
        inputs_NX = batch.inputs_NX.float() * self.mask_X
        norms_N = inputs_NX.flatten(1).norm(dim=1)
        bound = self.config.size * float(norms_N.square().mean().sqrt())
        unit = bound / max(1.0, float(self.mask_X.sum())) ** 0.5
        generator = torch.Generator().manual_seed(self.config.seed)
        start_X = torch.randn(self.mask_X.shape, generator=generator).to(self.mask_X.device)
        # Inputs may be of any size where the trigger may be: it is learned in units of theirs.
        free_X = (0.1 * start_X).requires_grad_()
        optimizer = torch.optim.Adam([free_X], self.config.learning_rate)
        wanted_N = torch.full((len(inputs_NX),), target, device=inputs_NX.device)
        for _ in range(self.config.steps):
            loss = F.cross_entropy(self.logits(batch, self._bounded(free_X, unit, bound)), wanted_N)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self._bounded(free_X, unit, bound).detach()

    def rate(self, batch: Batch, pattern_X: Tensor, target: int) -> float:
        """Share of inputs not of the class by the model that turn to it; 0 where all are."""
        with torch.no_grad():
            others_N = self.logits(batch).argmax(-1) != target
            turned_N = self.logits(batch, pattern_X).argmax(-1) == target
        count = int(others_N.sum())
        return int((turned_N & others_N).sum()) / count if count else 0.0

    def _bounded(self, free_X: Tensor, unit: float, bound: float) -> Tensor:
        pattern_X = free_X * self.mask_X * unit
        norm = pattern_X.norm()
        return pattern_X * (bound / norm).clamp(max=1.0) if float(norm.detach()) > 0 else pattern_X

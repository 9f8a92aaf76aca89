"""Merges that learn on unlabelled inputs: AdaMerging, Concrete, and DAM, which looks for backdoors.

DAM (Yang et al., ICLR 2025, 2410.13910) learns a mask on the merged change while a perturbation per
task, one for all its inputs, looks for what a trigger would do. Its released code has one mask; the
paper has two, of which nothing was released: ``dam_two_masks`` is our reading, m₁ ⊙ (1 − m₂), where
m₁ learns from clean inputs and m₂ from perturbed ones. Concrete (Tang et al., 2312.06173) is the
mask without the perturbation, AdaMerging (Yang et al., 2310.02575) the coefficients without a mask.

A step costs a forward pass, and a backward one, for the coefficients, the perturbations and the
masks each. Held beside the model: every module's merged change, its mask, and twice as much for
Adam, dense.

Shape legend: M modules, C contributions, m rows, n columns, N inputs, X of an input, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.aggregation.backdoor.calibration import Batch, Calibration, check_calibration
from anabranch.aggregation.backdoor.config import MaskingConfig, check_contract
from anabranch.aggregation.backdoor.masking import Blend, Masks, drawn_mask, entropy, rescaled

Progress = Callable[[int, int], None]
"""Called with the steps done and all there are."""


@dataclass(frozen=True)
class Learned:
    """What a merge learned.

    Attributes:
        changes: The merged change by module.
        coefficients_MC: Of each contribution in each module, in the order of ``Blend.modules``.
        masks: By module, over their mean; empty without a mask.
        losses: Of each step, mask first.
    """

    changes: Mapping[str, Tensor]
    coefficients_MC: Tensor  # noqa: N815
    masks: Masks
    losses: Sequence[float]


@dataclass(frozen=True)
class Around:
    """What a merged change is looked at with.

    Attributes:
        calibration: Model and inputs.
        changes: What is added to the merged change before: the start's.
        values: Parameters trained in full as the start has them.
    """

    calibration: Calibration
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def logits(self, task: str, batch: Batch, merged: Mapping[str, Tensor]) -> Tensor:
        """Logits [N, K] of the start with the merged change on it."""
        changes, values = dict(self.changes), dict(self.values)
        for name, change in merged.items():
            if name in values:
                values[name] = values[name] + change
            else:
                changes[name] = changes[name] + change if name in changes else change
        return self.calibration.logits(task, batch, changes, values)


def learn(
    parts: Blend, config: MaskingConfig, around: Around, progress: Progress | None = None
) -> Learned:
    """Learn masks and coefficients for a cohort's changes.

    Args:
        parts: The contributions.
        config: The rule and its settings.
        around: What to look with.
        progress: Told of every step.

    Raises:
        ValueError: No data may be used, or other data than configured.
        RuntimeError: A loss is not finite.
    """
    check_contract(config)
    check_calibration(around.calibration, config.data, config.split)
    return _Learning(parts, config, around, progress).run()


class _Learning:
    """One run; see ``learn``."""

    def __init__(
        self, parts: Blend, config: MaskingConfig, around: Around, progress: Progress | None
    ) -> None:
        self.parts, self.config, self.around, self.progress = parts, config, around, progress
        self.generator = torch.Generator().manual_seed(config.seed)
        masked = config.rule != "adamerging"
        self.mask_steps = config.mask_steps if masked else 0
        self.perturbs = config.rule in ("dam", "dam_two_masks")
        # The mask of the task, and that which finds the backdoor.
        kinds = 2 if config.rule == "dam_two_masks" else int(masked)
        self.logits = [
            {m: self._zeros(parts.shape(m)).requires_grad_() for m in parts.modules}
            for _ in range(kinds)
        ]
        self.average = parts.merged(torch.full_like(self._start(), 1 / parts.count).detach(), {})
        self.perturbations: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def run(self) -> Learned:
        config, steps = self.config, self.mask_steps + self.config.coefficient_steps
        mask_optimizers = [
            torch.optim.Adam(list(one.values()), config.mask_lr) for one in self.logits
        ]
        searcher: torch.optim.Optimizer | None = None
        for step in range(self.mask_steps):
            batches = self._batches(step)
            if self.perturbs and searcher is None:
                self.perturbations = {
                    task: torch.zeros_like(batch.inputs_NX[0]).requires_grad_()
                    for task, batch in batches.items()
                }
                searcher = torch.optim.Adam(
                    list(self.perturbations.values()), config.perturbation_lr
                )
            masks = self._drawn()
            coefficients_MC = self._inner(batches, masks)
            if searcher is not None:
                self._search(batches, coefficients_MC, masks, searcher)
            self._mask_step(batches, coefficients_MC, masks, mask_optimizers)
            self._tick(steps)
        masks = self._settled()
        coefficients_MC = self._start()
        optimizer = torch.optim.Adam([coefficients_MC], config.coefficient_lr)
        for step in range(config.coefficient_steps):
            batches = self._batches(self.mask_steps + step)
            loss = self._clean(batches, self.parts.merged(self._bounded(coefficients_MC), masks))
            self._step(optimizer, loss)
            self._note(loss)
            self._tick(steps)
        final_MC = self._bounded(coefficients_MC).detach()
        changes = {m: one.detach() for m, one in self.parts.merged(final_MC, masks).items()}
        return Learned(changes, final_MC, masks, self.losses)

    def _drawn(self) -> dict[str, Tensor]:
        drawn = [
            {
                m: drawn_mask(one[m], self.config.temperature, self.generator)
                for m in self.parts.modules
            }
            for one in self.logits
        ]
        return self._joined(drawn)

    def _settled(self) -> dict[str, Tensor]:
        """The masks at what their draws are around."""
        return {
            m: mask.detach()
            for m, mask in self._joined(
                [{m: torch.sigmoid(one[m]) for m in self.parts.modules} for one in self.logits]
            ).items()
        }

    @staticmethod
    def _joined(drawn: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if not drawn:
            return {}
        if len(drawn) == 1:
            return {m: rescaled(mask) for m, mask in drawn[0].items()}
        return {m: rescaled(mask * (1 - drawn[1][m])) for m, mask in drawn[0].items()}

    def _inner(self, batches: Mapping[str, Batch], masks: Masks) -> Tensor:
        """The coefficients for a mask: one step from where they begin."""
        coefficients_MC = self._start()
        if self.config.inner_lr > 0:
            fixed = {m: mask.detach() for m, mask in masks.items()}
            loss = self._clean(batches, self.parts.merged(coefficients_MC, fixed))
            self._step(torch.optim.Adam([coefficients_MC], self.config.inner_lr), loss)
        return self._bounded(coefficients_MC).detach()

    def _search(
        self,
        batches: Mapping[str, Batch],
        coefficients_MC: Tensor,
        masks: Masks,
        searcher: torch.optim.Optimizer,
    ) -> None:
        """One step of the perturbations away from what the merged model says of clean inputs."""
        fixed = {m: one.detach() for m, one in self.parts.merged(coefficients_MC, masks).items()}
        loss = torch.zeros(())
        for task, batch in batches.items():
            with torch.no_grad():
                labels_N = self.around.logits(task, batch, fixed).argmax(-1)
            moved_NK = self.around.logits(task, self._perturbed(task, batch), fixed)
            loss = loss - F.cross_entropy(moved_NK.float(), labels_N).cpu()
        self._step(searcher, loss)
        bound = self.config.perturbation_norm
        if bound is not None:
            with torch.no_grad():
                for one in self.perturbations.values():
                    one.mul_(min(1.0, bound / max(float(one.norm()), 1e-12)))

    def _mask_step(
        self,
        batches: Mapping[str, Batch],
        coefficients_MC: Tensor,
        masks: Masks,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        merged = self.parts.merged(coefficients_MC, masks)
        clean = self._clean(batches, merged)
        total = clean
        if self.perturbs:
            moved = self.config.perturbation_weight * self._moved(batches, merged)
            total = clean + moved
        for optimizer in optimizers:
            optimizer.zero_grad()
        if len(optimizers) == 2:
            # Each mask learns from its own: the task's from clean inputs, the other from perturbed.
            for one, loss in zip(self.logits, (clean, moved), strict=True):
                found = torch.autograd.grad(loss, list(one.values()), retain_graph=True)
                for logits, gradient in zip(one.values(), found, strict=True):
                    logits.grad = gradient
        else:
            total.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        self._note(total)

    def _clean(self, batches: Mapping[str, Batch], merged: Mapping[str, Tensor]) -> Tensor:
        """What is wanted of clean inputs, summed over tasks."""
        found = []
        for task, batch in batches.items():
            logits_NK = self.around.logits(task, batch, merged)
            if self.config.wanted == "entropy":
                found.append(entropy(logits_NK))
            else:
                found.append(F.cross_entropy(logits_NK.float(), self._averaged(task, batch)))
        return torch.stack(found).sum()

    def _moved(self, batches: Mapping[str, Batch], merged: Mapping[str, Tensor]) -> Tensor:
        """The same on perturbed inputs."""
        found = []
        for task, batch in batches.items():
            moved_NK = self.around.logits(task, self._perturbed(task, batch), merged)
            if self.config.wanted == "entropy":
                found.append(entropy(moved_NK))
            else:
                found.append(F.cross_entropy(moved_NK.float(), self._averaged(task, batch)))
        return torch.stack(found).sum()

    def _averaged(self, task: str, batch: Batch) -> Tensor:
        """What the plain average says of the clean inputs: it does not move with the mask."""
        with torch.no_grad():
            return self.around.logits(task, batch, self.average).argmax(-1)

    def _perturbed(self, task: str, batch: Batch) -> Batch:
        return Batch(batch.inputs_NX + self.perturbations[task], batch.context)

    def _batches(self, step: int) -> dict[str, Batch]:
        calibration, size = self.around.calibration, self.config.batch_size
        return {task: calibration.batch(task, step, size) for task in calibration.tasks}

    def _start(self) -> Tensor:
        shape = len(self.parts.modules), self.parts.count
        return self._zeros(torch.Size(shape)).add_(self.config.coefficient).requires_grad_()

    def _bounded(self, coefficients_MC: Tensor) -> Tensor:
        return coefficients_MC.clamp(0, 1) if self.config.clamp else coefficients_MC

    def _zeros(self, shape: torch.Size) -> Tensor:
        held = [*self.parts.entries.values(), *(b for b, _, _ in self.parts.products.values())]
        return torch.zeros(shape, device=held[0].device)

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def _note(self, loss: Tensor) -> None:
        value = float(loss.detach())
        if value != value or abs(value) == float("inf"):
            raise RuntimeError(
                f"{self.config.rule}: the loss is {value} at step {len(self.losses)}; lower "
                "mask_lr or coefficient_lr, or look for a contribution that is not sane"
            )
        self.losses.append(value)

    def _tick(self, steps: int) -> None:
        if self.progress is not None:
            self.progress(len(self.losses), steps)

"""The diagonal Fisher of a trained adapter: how sure the model is of each entry (2111.09832).

F = E_x E_y~p(y|x) (∂ log p(y|x) / ∂θ)², with one label drawn per prediction. Labels come from the
model, as in the paper, and not from the data (the empirical Fisher): of examples that it has
learnt, those say nothing any more. One example at a time, so that each gradient is exactly one
example's, whatever layers the model is made of.

Shape legend: P predictions of an example, K labels, L positions of an example, m rows, n columns of
a module's weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anabranch.client.lora import adapted_layers, trained_in_full
from anabranch.vectors.adapter import Trained
from anabranch.vectors.importance import closest_product
from anabranch.vectors.task_vector import Held

if TYPE_CHECKING:
    from peft.tuners.lora import Linear


def diagonal_fisher(
    model: nn.Module, logits: Iterable[Tensor], trained: Trained = "both", seed: int = 0
) -> dict[str, Held]:
    """The Fisher at the adapter that a model holds.

    Of an adapted module it is that of the merged weight's entries, ΔW's, and not of the factors':
    A and B can be turned against each other without a change to the model. The squared gradients
    themselves are summed exactly by row and by column, and the product closest to them is kept:
    m + n numbers for m·n. Parameters trained in full keep all entries; so does a LoRA factor that
    is trained alone.

    Args:
        model: What ``attach`` returned.
        logits: For each example in turn, logits [K] or [P, K] of a forward pass that this iteration
            makes; see ``FisherTask``.
        trained: The LoRA factors that were trained.
        seed: Of the labels drawn.

    Returns:
        Importance by module or parameter, as ``vectors.importance`` holds it: a mean over examples.

    Raises:
        ValueError: No example, or numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = adapted_layers(model) if trained == "both" else {}
    full = trained_in_full(model, trained)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    count = 0
    with _recorded(layers) as calls:
        for logits_PK in logits:
            targets = [*(call.output for call in calls), *full.values()]
            gradients = torch.autograd.grad(
                _log_likelihood(logits_PK, generator), targets, allow_unused=True
            )
            for name, gradient_mn in _of_weights(calls, gradients).items():
                square_mn = gradient_mn.double().square_()
                _add(rows, name, square_mn.sum(dim=1))
                _add(columns, name, square_mn.sum(dim=0))
            for name, gradient in zip(full, gradients[len(calls) :], strict=True):
                if gradient is not None:
                    _add(squares, name, gradient.double().square_())
            calls.clear()
            count += 1
    if not count:
        raise ValueError("there is no example to take the Fisher of; give at least one")
    importance: dict[str, Held] = {}
    for name, layer in layers.items():
        # A layer that no example reached matters to none.
        sums = (
            rows.get(name, torch.zeros(int(layer.out_features or 0))),
            columns.get(name, torch.zeros(int(layer.in_features or 0))),
        )
        importance[name] = closest_product(*(total.cpu() / count for total in sums))
    for name, parameter in full.items():
        total = squares.get(name, torch.zeros(parameter.shape))
        importance[name] = (total.cpu() / count).float()
    return importance


def _log_likelihood(logits_PK: Tensor, generator: torch.Generator) -> Tensor:
    """Log p of labels drawn from the model's own distribution, one for each prediction."""
    log_p_PK = logits_PK.float().log_softmax(dim=-1).view(-1, logits_PK.shape[-1])
    chances_PK = log_p_PK.detach().exp().cpu()
    if not bool(chances_PK.isfinite().all()):
        raise ValueError("the model's predictions are not finite: the training diverged")
    drawn_P1 = torch.multinomial(chances_PK, 1, generator=generator)
    return log_p_PK.gather(1, drawn_P1.to(log_p_PK.device)).sum()


@dataclass(frozen=True)
class _Call:
    """What went into an adapted layer and what came out of it."""

    name: str
    input_Ln: Tensor  # noqa: N815
    output: Tensor


@contextmanager
def _recorded(layers: dict[str, Linear]) -> Iterator[list[_Call]]:
    """The calls of these layers, as they are made."""
    calls: list[_Call] = []

    def record(name: str, layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        calls.append(_Call(name, given[0].detach().flatten(0, -2), output))

    hooks = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _of_weights(calls: list[_Call], gradients: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Gradient of each layer's weight [m, n]: Σ_l δ_l x_lᵀ over positions and calls."""
    found: dict[str, Tensor] = {}
    for call, gradient in zip(calls, gradients, strict=False):
        if gradient is not None:
            delta_Lm = gradient.flatten(0, -2).float()
            _add(found, call.name, delta_Lm.T @ call.input_Ln.float())
    return found


def _add(totals: dict[str, Tensor], name: str, part: Tensor) -> None:
    totals[name] = totals[name] + part if name in totals else part

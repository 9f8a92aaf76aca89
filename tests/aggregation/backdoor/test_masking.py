from __future__ import annotations

import pytest
import torch
from torch.distributions import RelaxedBernoulli

from anabranch.aggregation.backdoor.masking import blend, drawn_mask, entropy, rescaled
from anabranch.vectors.task_vector import LowRank, TaskVector


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.2, 0.5, 2.0])
def test_masks_are_drawn_as_torch_draws_them(temperature: float) -> None:
    logits = torch.tensor([-2.0, 0.0, 1.5])
    mine = drawn_mask(logits.expand(40_000, 3), temperature, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    theirs = RelaxedBernoulli(torch.tensor(temperature), logits=logits).sample((40_000,))
    levels = torch.linspace(0.05, 0.95, 10)
    quantiles = [torch.quantile(one, levels, dim=0) for one in (mine, theirs)]
    torch.testing.assert_close(quantiles[0], quantiles[1], atol=0.04, rtol=0)


def test_a_mask_can_be_learned() -> None:
    logits = draw(0, 6, 5).requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return (drawn_mask(values, 0.5, torch.Generator().manual_seed(3)) * draw(1, 6, 5)).sum()

    (mine,) = torch.autograd.grad(loss(logits), logits)
    step, still = 1e-3, logits.detach()
    for row, column in ((0, 0), (3, 4)):
        moved = torch.zeros(6, 5)
        moved[row, column] = step
        slope = (loss(still + moved) - loss(still - moved)) / (2 * step)
        assert float(slope) == pytest.approx(float(mine[row, column]), abs=1e-3)


def test_a_rescaled_mask_has_a_mean_of_one() -> None:
    assert float(rescaled(draw(0, 30, 20).sigmoid()).mean()) == pytest.approx(1.0, abs=1e-6)


def test_entropy_is_that_of_the_probabilities() -> None:
    logits = draw(0, 7, 4)
    naive = 0.0
    for row in logits:
        for probability in row.softmax(0).tolist():
            naive -= probability * torch.tensor(probability).log().item() / 7
    assert float(entropy(logits)) == pytest.approx(naive, rel=1e-5)


def test_a_blend_sums_what_the_changes_are() -> None:
    ranks = (2, 4, 1)
    vectors = [
        TaskVector({"m": LowRank(draw(i, 6, k), draw(9 + i, k, 5)), "bias": draw(20 + i, 5)})
        for i, k in enumerate(ranks)
    ]
    parts = blend(vectors)
    assert parts.modules == ["bias", "m"]
    assert parts.shape("m") == (6, 5)
    coefficients_MC = draw(3, 2, 3)
    masks = {"m": draw(4, 6, 5).sigmoid()}
    merged = parts.merged(coefficients_MC, masks)
    for row, module in enumerate(parts.modules):
        total = torch.zeros(parts.shape(module))
        for place, vector in enumerate(vectors):
            change = vector.deltas[module]
            dense = change.dense() if isinstance(change, LowRank) else change
            total += coefficients_MC[row, place] * dense  # type: ignore[arg-type]
        torch.testing.assert_close(merged[module], total * masks.get(module, torch.tensor(1.0)))

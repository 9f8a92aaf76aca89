"""Entry-wise methods and angles against FusionBench 0.2.33, and where they part."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.magmax import magmax_merge
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.slerp.slerp_utils import slerp
from fusion_bench.method.tall_mask import task_arithmetic as tall_mask_class
from fusion_bench.method.tall_mask.utils import generate_task_masks
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.weighted_average.weighted_average import WeightedAverageAlgorithm
from torch import Tensor, nn

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.methods.consensus import CONSENSUS, ConsensusConfig
from anabranch.aggregation.methods.dare_linear import DareConfig, dare_linear
from anabranch.aggregation.methods.dare_ties import dare_ties
from anabranch.aggregation.methods.fisher import FisherConfig, fisher
from anabranch.aggregation.methods.magmax import MAGMAX
from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.model_stock import MODEL_STOCK
from anabranch.aggregation.methods.slerp import SLERP, SlerpConfig
from anabranch.aggregation.methods.ties import TIES, TiesConfig
from anabranch.vectors import TaskVector

WEIGHTS = [0.1, 0.5, 2.0, 1.3]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def model(weight_mn: Tensor) -> nn.Linear:
    """A model of one weight."""
    layer = nn.Linear(weight_mn.shape[1], weight_mn.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_mn.clone())
    return layer


def pool(tensors: Sequence[Tensor], base: Tensor | None = None) -> BaseModelPool:
    """Fine-tuned models, over a base of zero unless told otherwise."""
    start = torch.zeros_like(tensors[0]) if base is None else base
    models = {str(index): model(start + tensor) for index, tensor in enumerate(tensors)}
    return BaseModelPool({"_pretrained_": model(start), **models})


def test_mean(adversarial: list[Tensor]) -> None:
    stack = torch.stack(adversarial)
    assert_near(MEAN(stack), simple_average(adversarial))
    weights = WEIGHTS[: len(adversarial)]
    theirs = WeightedAverageAlgorithm(normalize=True, weights=weights).run(pool(adversarial))
    assert_near(MEAN(stack, torch.tensor(weights)), theirs.weight)


def test_task_arithmetic(adversarial: list[Tensor]) -> None:
    theirs = TaskArithmeticAlgorithm(scaling_factor=0.3).run(pool(adversarial))
    vectors = [TaskVector({"w": tensor}) for tensor in adversarial]
    found = merge_task_vectors(vectors, Recipe(method="task_arithmetic", scale=0.3)).deltas["w"]
    assert isinstance(found, Tensor)
    assert_near(found, theirs.weight)


def one_more(density: float, entries: int) -> float:
    """A density at which ours keeps the int(density·n) + 1 entries that FusionBench keeps."""
    return (int(density * entries) + 1.5) / entries


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.53, 0.99])
def test_ties_over_a_whole_model(distinct: list[Tensor], density: float) -> None:
    """Two modules of unlike sizes, one threshold. A density of 0 keeps one entry there."""
    parts = [{"a": tensor[:4], "b": 0.1 * tensor[4:]} for tensor in distinct]
    flat_CD = torch.stack([torch.cat([part["a"].flatten(), part["b"].flatten()]) for part in parts])
    theirs = ties_merging(flat_CD, reset_thresh=density, merge_func="mean")
    params = {"density": min(1.0, one_more(density, 23 * 31)), "scope": "model"}
    merged = merge_task_vectors(
        [TaskVector(part) for part in parts], Recipe(method="ties", params=params)
    )
    found = torch.cat([delta.flatten() for _, delta in merged.items()])  # type: ignore[union-attr]
    split_votes = flat_CD.sum(dim=0) == 0
    assert_near(found[~split_votes], theirs[~split_votes])


def test_ties_of_a_split_vote(tensors: list[Tensor]) -> None:
    """A known disagreement: a sum of zero elects the sign of all sums' signs there, + here."""
    opposite = torch.stack([tensors[0].flatten(), -tensors[0].flatten()])
    theirs = ties_merging(opposite, 0.5, "mean")
    found = TIES(opposite, None, TiesConfig(density=one_more(0.5, 23 * 31)))
    # All sums are zero there, and zero is not above zero: the negative side is averaged.
    assert int((found > 0).sum()) == 357
    assert torch.equal(theirs, -found)


def test_ties_keeps_all_where_fusion_bench_fails(tensors: list[Tensor]) -> None:
    """A known disagreement: a density of 1 asks for the smallest but none."""
    with pytest.raises((RuntimeError, IndexError), match="kthvalue"):
        ties_merging(torch.stack(tensors).flatten(1), 1.0, "mean")
    found = TIES(tensors[0][None], None, TiesConfig(density=1))
    assert torch.equal(found, tensors[0])


@pytest.mark.parametrize("mask_scale", [0.0, 0.2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("votes", [1, 2, 4])
def test_consensus(adversarial: list[Tensor], mask_scale: float, votes: int) -> None:
    """FusionBench reads its masks from a folder of checkpoints, so they are counted here."""
    deltas_CD = torch.stack(adversarial).flatten(1)
    config = ConsensusConfig(mask_scale=mask_scale, votes=votes)
    if votes > len(adversarial):
        with pytest.raises(ValueError, match="never agree"):
            CONSENSUS(deltas_CD, None, config)
        return
    masks_CD = generate_task_masks(
        deltas_CD, deltas_CD, torch.zeros(23 * 31), tall_mask_lambda=mask_scale
    )
    expected = deltas_CD.sum(dim=0) * (masks_CD.sum(dim=0) >= votes)
    assert_near(CONSENSUS(deltas_CD, None, config), expected)


def test_fusion_benchs_tall_mask_class_takes_task_vectors_for_parameters(
    tensors: list[Tensor],
) -> None:
    """A known disagreement: with θ0 in it, |θ0 − τ| > λ|Στ − τ| says nothing of the task."""
    base = 3 * torch.ones(23, 31)
    tuned_CD = torch.stack([(base + tensor).flatten() for tensor in tensors])
    deltas_CD = torch.stack(tensors).flatten(1)
    right_CD = generate_task_masks(deltas_CD, tuned_CD, base.flatten(), tall_mask_lambda=0.4)
    total = {"w": sum(tensors)}
    odd = [
        tall_mask_class.generate_task_masks(total, {"w": tensor}, {"w": base}, 0.4)["w"]
        for tensor in tensors
    ]
    assert float((torch.stack(odd).flatten(1) != right_CD).float().mean()) > 0.1
    found = CONSENSUS(deltas_CD, None, ConsensusConfig(mask_scale=0.4))
    assert_near(found, deltas_CD.sum(dim=0) * (right_CD.sum(dim=0) >= 2))


def test_magmax(adversarial: list[Tensor]) -> None:
    models = [model(tensor) for tensor in adversarial]
    theirs = magmax_merge(model(torch.zeros(23, 31)), models).weight
    found = MAGMAX(torch.stack(adversarial))
    # A known disagreement: of two equal magnitudes the later wins there, the positive here.
    torch.testing.assert_close(found.abs(), theirs.abs())
    high, low = (
        torch.stack(adversarial).max(dim=0).values,
        torch.stack(adversarial).min(dim=0).values,
    )
    tied = high == -low
    torch.testing.assert_close(found[~tied], theirs[~tied])
    assert bool((found[tied] >= 0).all())


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(adversarial: list[Tensor], t: float) -> None:
    pair = [adversarial[0], adversarial[-1]]
    assert_near(SLERP(torch.stack(pair), None, SlerpConfig(t=t)), slerp(t, *pair))


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Task vectors that have much in common, not all pairs the same."""
    shared = torch.randn(23, 31, generator=torch.Generator().manual_seed(9))
    return [factor * shared + tensor for factor, tensor in zip((1, 2, 3, 4), tensors, strict=True)]


def test_model_stock_of_two(tensors: list[Tensor]) -> None:
    zero = torch.zeros(23, 31)
    for pair in (
        alike(tensors)[:2],
        [tensors[0], 3 * tensors[0]],
        [zero, tensors[0]],
        [zero, zero],
    ):
        theirs = ModelStock().run(pool(pair)).weight
        assert_near(MODEL_STOCK(torch.stack(pair)), theirs)


def test_fusion_benchs_model_stock_averages_angles(tensors: list[Tensor]) -> None:
    """A known disagreement: of three or more it takes the cosine of the mean angle."""
    several = alike(tensors)
    theirs = ModelStock().run(pool(several)).weight.flatten()
    flat_CD = torch.stack(several).flatten(1)
    unit_CD = nn.functional.normalize(flat_CD.double())
    pairs = torch.triu_indices(4, 4, offset=1)
    cosines = (unit_CD @ unit_CD.T)[pairs[0], pairs[1]]

    def average(cosine: Tensor) -> Tensor:
        return (4 * cosine / (1 + 3 * cosine)).float() * flat_CD.mean(dim=0)

    assert_near(theirs, average(cosines.acos().mean().cos()))
    assert_near(MODEL_STOCK(flat_CD), average(cosines.mean()))
    assert not torch.allclose(theirs, MODEL_STOCK(flat_CD), rtol=1e-3)


def test_fusion_benchs_model_stock_goes_the_other_way_when_angles_are_wide() -> None:
    """A known disagreement, as with mergekit: of two at 120 degrees −2 times the average."""
    pair = [torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, 0.75**0.5]])]
    assert_near(ModelStock().run(pool(pair)).weight, -(pair[0] + pair[1]))
    assert not bool(MODEL_STOCK(torch.stack(pair)).any())


def test_fusion_benchs_model_stock_refuses_one(tensors: list[Tensor]) -> None:
    """A known disagreement: one contribution is returned as it is here."""
    with pytest.raises(ValueError, match="at least 2"):
        ModelStock().run(pool(tensors[:1]))
    assert torch.equal(MODEL_STOCK(tensors[0][None]), tensors[0])


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.37, 1.0])
def test_dare_with_its_masks_injected(
    adversarial: list[Tensor], name: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DARE by sum there, by mean here. Its TIES trims the rest; told to keep .999 it trims none."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.rand(23, 31, generator=generator) for _ in adversarial]
    keep_CD = torch.stack(draws).flatten(1) > 1 - density
    remaining = iter(draws)
    monkeypatch.setattr(torch, "rand_like", lambda parameter: next(remaining))
    given = {"sparsity_ratio": 1 - density, "only_on_linear_weights": False, "rescale": True}
    deltas_CD = torch.stack(adversarial).flatten(1)
    weights_C = torch.ones(len(adversarial))
    config = DareConfig(density=density)
    if name == "dare_linear":
        theirs = DareTaskArithmetic(scaling_factor=1.0, **given).run(pool(adversarial))
        found = dare_linear(deltas_CD, weights_C, config, keep_CD=keep_CD) * len(adversarial)
        assert_near(found, theirs.weight.flatten())
        return
    ties = {"scaling_factor": 1.0, "threshold": 0.999, "remove_keys": [], "merge_func": "mean"}
    theirs = DareTiesMerging(**given, **ties).run(pool(adversarial)).weight.flatten()
    found = dare_ties(deltas_CD, weights_C, config, keep_CD=keep_CD)
    # Split votes: see test_ties_of_a_split_vote.
    decided = (deltas_CD * keep_CD).sum(dim=0) != 0
    assert_near(found[decided], theirs[decided])


def test_dare_at_a_density_of_zero(tensors: list[Tensor]) -> None:
    """A known disagreement: nothing divided by nothing there, refused here."""
    algorithm = DareTaskArithmetic(
        scaling_factor=1.0, sparsity_ratio=1.0, only_on_linear_weights=False
    )
    assert bool(algorithm.run(pool(tensors)).weight.isnan().any())
    with pytest.raises(ValueError, match="density"):
        DareConfig(density=0)


@pytest.mark.parametrize("weights", [[1.0, 1, 1, 1], WEIGHTS])
def test_fisher(adversarial: list[Tensor], weights: list[float]) -> None:
    """As it comes: its normalised Fisher has a length of 1, ours a mean of 1, so ε differs too."""
    count = len(adversarial)
    generator = torch.Generator().manual_seed(3)
    fishers = [torch.rand(23, 31, generator=generator) ** 4 for _ in range(count)]
    fishers[0] = fishers[0] * (torch.arange(31) % 2)
    theirs = merging_with_fisher_weights(
        {"w": adversarial},
        [{"w": each} for each in fishers],
        torch.tensor(weights[:count]),
        normalize_fisher_weight=False,
    )["w"]
    found = fisher(
        torch.stack(adversarial).flatten(1),
        torch.tensor(weights[:count], dtype=torch.float64),
        FisherConfig(normalise="none"),
        importances_CD=torch.stack(fishers).flatten(1),
    )
    assert_near(found, theirs.flatten())

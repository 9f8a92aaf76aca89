"""Steps before a method: what they do, and that every way through the engine does the same."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_task_vectors
from anabranch.aggregation.kernels import linear
from anabranch.aggregation.kernels.linear import mixtures
from anabranch.aggregation.method import combine
from anabranch.aggregation.registry import methods
from anabranch.aggregation.robust import (
    ALIKE,
    BUCKETING,
    CLIP,
    NNM,
    OVERSIZED,
    PRE_AGGREGATORS,
    UNIT_NORM,
)
from anabranch.aggregation.robust.alike import AlikeConfig
from anabranch.aggregation.robust.bucketing import BucketingConfig
from anabranch.aggregation.robust.clip import ClipConfig
from anabranch.aggregation.robust.oversized import OversizedConfig
from anabranch.aggregation.robust.unit_norm import UnitNormConfig
from anabranch.vectors import Adapter, LoraFactors, LowRank, TaskVector

STEPS = [{"name": "clip"}, {"name": "nnm", "params": {"f": 2}}]


def recipe(method: str, pre: list[dict[str, Any]], **params: Any) -> Recipe:
    return Recipe.model_validate({"method": method, "pre": pre, "params": params})


def vectors(count: int = 7, dense: bool = True) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for client in range(count):
        b_mk = torch.randn(12, 2, generator=generator) * (10 if client == 2 else 1)
        a_kn = torch.randn(2, 9, generator=generator)
        matrix = b_mk @ a_kn if dense else LowRank(b_mk, a_kn)
        found.append(TaskVector({"a": matrix, "b": torch.randn(31, generator=generator)}))
    return found


def flat(vector: TaskVector) -> Tensor:
    parts = (vector.deltas[name] for name in sorted(vector.deltas))
    return torch.cat(
        [p.dense().flatten() if isinstance(p, LowRank) else p.flatten() for p in parts]
    )


ENTRY_METHODS = ("mean", "ties", "median", "trimmed_mean", "dare_ties", "multi_krum", "sign_vote")


@pytest.mark.parametrize("method", ENTRY_METHODS)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factors"])
def test_the_engine_merges_the_mixtures(method: str, dense: bool) -> None:
    inputs = vectors(dense=dense)
    ours = flat(merge_task_vectors(inputs, recipe(method, STEPS)))
    mixed_KD = NNM(CLIP(torch.stack([flat(vector) for vector in inputs])), NNM.config(f=2))
    mixed = [TaskVector({"a": one[:108].view(12, 9), "b": one[108:]}) for one in mixed_KD]
    wanted = flat(merge_task_vectors(mixed, recipe(method, [])))
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["ties", "geometric_median"])
def test_the_result_does_not_depend_on_the_budget(method: str) -> None:
    generator = torch.Generator().manual_seed(8)
    inputs = [TaskVector({"a": torch.randn(300, 50, generator=generator)}) for _ in range(6)]
    small, large = (
        flat(merge_task_vectors(inputs, recipe(method, STEPS), budget_bytes=size))
        for size in (1 << 18, 1 << 28)
    )
    assert torch.equal(small, large)


@pytest.mark.parametrize("method", ["median", "ties"])
def test_mixtures_for_a_kernel_are_copied_within_the_budget(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel reads large dense modules where they lie, in one chunk: mixtures lie nowhere yet."""
    generator = torch.Generator().manual_seed(8)
    inputs = [TaskVector({"a": torch.randn(2200, 500, generator=generator)}) for _ in range(4)]
    budget_bytes, mixed = 1 << 21, []

    def counted(deltas_CD: Tensor, mix_KC: Tensor) -> Tensor:
        mixed.append(deltas_CD.nbytes)
        found_KD = mixtures(deltas_CD, mix_KC)
        assert torch.equal(found_KD[1], combine(deltas_CD, mix_KC[1]))
        return found_KD

    monkeypatch.setattr(linear, "mixtures", counted)
    small = merge_task_vectors(inputs, recipe(method, STEPS[:1]), budget_bytes=budget_bytes)
    assert 0 < max(mixed) <= budget_bytes // 2
    large = merge_task_vectors(inputs, recipe(method, STEPS[:1]))
    assert torch.equal(flat(small), flat(large))


def test_adapters_go_the_same_way() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 9), (12, 2))
    factors = [
        LoraFactors(*(torch.randn(shape, generator=generator) for shape in shapes), 2.0)
        for _ in range(6)
    ]
    adapters = [Adapter({"m": one}) for one in factors]
    for method in ("median", "multi_krum"):
        result = merge(adapters, recipe(method, STEPS).model_copy())
        inputs = [TaskVector({"m": one.lora["m"].delta()}) for one in adapters]
        whole = merge_task_vectors(inputs, recipe(method, STEPS)).deltas["m"]
        whole = whole.dense() if isinstance(whole, LowRank) else whole
        mine = result.adapter.lora["m"].delta().dense()
        left, values, right = torch.linalg.svd(whole.double())
        best = (left[:, :2] * values[:2]) @ right[:2]
        torch.testing.assert_close(mine.double(), best, atol=1e-4, rtol=1e-4)


# Buckets go by the place in the cohort.
ORDERLESS = [step for step in PRE_AGGREGATORS if step is not BUCKETING]


@given(st.integers(3, 9), st.integers(0, 1000), st.sampled_from(ORDERLESS))
@settings(max_examples=60, deadline=None)
def test_steps_commute_with_the_order_of_contributions(count: int, seed: int, step: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas_CD = torch.randn(count, 40, generator=generator)
    order = torch.randperm(count, generator=generator)
    torch.testing.assert_close(step(deltas_CD)[order], step(deltas_CD[order]), atol=1e-6, rtol=1e-5)


def test_clip_and_unit_norm_go_by_the_median_of_the_cohort() -> None:
    deltas_CD = torch.diag(torch.tensor([1.0, 2.0, 3.0, 100.0, 0.0]))
    assert CLIP(deltas_CD).norm(dim=1).tolist() == pytest.approx([1, 2, 2, 2, 0])
    assert CLIP(deltas_CD, ClipConfig(norm=50)).norm(dim=1).tolist() == pytest.approx(
        [1, 2, 3, 50, 0]
    )
    assert UNIT_NORM(deltas_CD).norm(dim=1).tolist() == pytest.approx([2, 2, 2, 2, 0])
    assert UNIT_NORM(deltas_CD, UnitNormConfig(norm=1)).norm(dim=1).tolist() == [1, 1, 1, 1, 0]


def test_bucketing_follows_its_seed() -> None:
    deltas_CD = torch.randn(9, 20, generator=torch.Generator().manual_seed(1))
    first, again, other = (
        BUCKETING(deltas_CD, BucketingConfig(size=2, seed=seed)) for seed in (1, 1, 2)
    )
    assert len(first) == 5
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("factor", [1e3, 1e9])
def test_two_of_nine_move_a_mixed_median_by_no_more_than_the_honest_spread(factor: float) -> None:
    generator = torch.Generator().manual_seed(6)
    honest_CD = 1 + 0.1 * torch.randn(7, 400, generator=generator)
    evil_CD = factor * torch.randn(2, 400, generator=generator)
    everyone = torch.cat([honest_CD[:3], evil_CD, honest_CD[3:]])
    inputs = [TaskVector({"a": one}) for one in everyone]
    steps = [{"name": "arc", "params": {"f": 2}}, {"name": "nnm", "params": {"f": 2}}]
    moved = flat(merge_task_vectors(inputs, recipe("median", steps))) - honest_CD.mean(dim=0)
    assert float(moved.norm()) < float((honest_CD - honest_CD.mean(dim=0)).norm(dim=1).max())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"method": "ties", "pre": [{"name": "nmm"}]},
            "'nmm' is no pre-aggregation; choose from alike, arc",
        ),
        ({"method": "ties", "pre": [{"name": "nnm", "params": {"f": -1}}]}, r"pre\.0\.params\.f"),
        ({"method": "ties", "pre": [{"name": "nnm", "params": {"f": 4}}]}, "4 malicious of 7"),
        ({"method": "tsv_m", "pre": [{"name": "clip"}]}, "takes whole matrices"),
        ({"method": "fedit", "pre": [{"name": "clip"}]}, "takes whole matrices, factors"),
        (
            {"method": "mean", "pre": [{"name": "clip"}], "weights": [1, 2, 1, 1, 1, 1, 1]},
            "count each contribution once",
        ),
        (
            {"method": "task_arithmetic", "pre": [{"name": "clip"}], "weights": [0.3] * 7},
            "count each contribution once",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        merge_task_vectors(vectors(), Recipe.model_validate(given))
    assert "\n" not in str(caught.value)


def test_every_method_on_entries_takes_a_step() -> None:
    inputs = vectors()
    for name, method in methods().items():
        if method.matrices or method.factors or method.needs_importance or method.needs_names:
            continue
        some = inputs[:2] if name == "slerp" else inputs
        merged = flat(merge_task_vectors(some, recipe(name, [{"name": "clip"}])))
        assert bool(merged.isfinite().all()), name


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_the_mean_of_the_others_stands_for_what_is_too_long(factor: float) -> None:
    generator = torch.Generator().manual_seed(4)
    deltas_CD = torch.nn.functional.normalize(torch.randn(7, 40, generator=generator), dim=1)
    deltas_CD *= torch.tensor([1.0, 0.9, 1.1, 2.5, 1.9, 1.0, 1e6])[:, None]  # median 1.1
    mixed_CD = OVERSIZED(deltas_CD, OversizedConfig(factor=factor))
    long = [row for row in range(7) if float(deltas_CD[row].norm()) > factor * 1.1]
    assert long == ([3, 6] if factor == 2 else [6])
    kept = [row for row in range(7) if row not in long]
    wanted_D = torch.stack([deltas_CD[row] for row in kept]).mean(dim=0)
    for row in range(7):
        expected_D = wanted_D if row in long else deltas_CD[row]
        torch.testing.assert_close(mixed_CD[row], expected_D)
    torch.testing.assert_close(mixed_CD.mean(dim=0), wanted_D)


def test_nobody_is_too_long_where_most_send_nothing() -> None:
    """The median is zero then; who sends nothing is no measure of who sends something."""
    deltas_CD = torch.zeros(5, 3)
    deltas_CD[4] = 1
    assert torch.equal(OVERSIZED(deltas_CD), deltas_CD)


def group(cosine: float, members: int, others: int = 7) -> Tensor:
    """Orthogonal rows, and some with this cosine to each other."""
    count = members + others
    deltas_CD = torch.eye(count + 1)[:count]
    deltas_CD[others:] *= (1 - cosine) ** 0.5
    deltas_CD[others:, count] = cosine**0.5
    return deltas_CD * torch.arange(1, count + 1)[:, None]


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("cosine", [0.05, 0.2, 1.0])
def test_a_group_more_alike_than_the_others_is_left_out(members: int, cosine: float) -> None:
    deltas_CD = group(cosine, members)
    mixed_CD = ALIKE(deltas_CD, AlikeConfig(f=4))
    wanted_CD = deltas_CD.clone()
    if cosine > 0.1:
        wanted_CD[7:] = deltas_CD[:7].mean(dim=0)
    torch.testing.assert_close(mixed_CD, wanted_CD)


def test_a_group_larger_than_f_or_of_one_is_let_be() -> None:
    """A majority that agrees is honest; of one attacker nothing is alike."""
    deltas_CD = group(0.5, 4)
    torch.testing.assert_close(ALIKE(deltas_CD, AlikeConfig(f=3)), deltas_CD)
    torch.testing.assert_close(ALIKE(deltas_CD, AlikeConfig(f=1)), deltas_CD)
    with pytest.raises(ValueError, match="alike: f: 6 malicious of 11 are no minority"):
        ALIKE(deltas_CD, AlikeConfig(f=6))

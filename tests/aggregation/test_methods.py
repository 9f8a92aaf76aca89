"""Each method against a loop over entries, written from the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, inner_products, squared_distances
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.dare_linear import DARE_LINEAR, DareConfig, dare_linear
from anabranch.aggregation.methods.dare_ties import DARE_TIES, dare_ties
from anabranch.aggregation.methods.fedit import FEDIT
from anabranch.aggregation.methods.geometric_median import (
    GEOMETRIC_MEDIAN,
    GeometricMedianConfig,
    geometric_median,
)
from anabranch.aggregation.methods.mean import MEAN, mean
from anabranch.aggregation.methods.median import MEDIAN, median
from anabranch.aggregation.methods.multi_krum import MULTI_KRUM, MultiKrumConfig, multi_krum
from anabranch.aggregation.methods.task_arithmetic import TASK_ARITHMETIC, task_arithmetic
from anabranch.aggregation.methods.ties import TIES, TiesConfig, ties
from anabranch.aggregation.methods.trimmed_mean import TrimmedMeanConfig, trimmed_mean
from anabranch.aggregation.statistics import Statistic, entries_as_they_are

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64)


def deltas(count: int = 5, entries: int = 211, seed: int = 0) -> Tensor:
    return torch.randn(count, entries, generator=torch.Generator().manual_seed(seed))


ADVERSARIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda deltas_CD: deltas_CD,
    "zeros": torch.zeros_like,
    "equal": lambda deltas_CD: deltas_CD[:1].expand_as(deltas_CD),
    "many ties": torch.round,
    "opposite": lambda deltas_CD: deltas_CD[:1] * (-1.0) ** torch.arange(len(deltas_CD))[:, None],
    "one far larger": lambda deltas_CD: torch.cat([1e4 * deltas_CD[:1], deltas_CD[1:]]),
    "of rank one": lambda deltas_CD: deltas_CD[:, :1] * deltas_CD[:1],
}
of_any_kind = pytest.mark.parametrize("case", ADVERSARIAL)


def naive_ties(deltas_CD: Tensor, weights: list[float], keep: int) -> Tensor:
    trimmed = []
    for row in deltas_CD.tolist():
        threshold = sorted((abs(v) for v in row), reverse=True)[keep - 1]
        trimmed.append([v if abs(v) >= threshold and v != 0 else 0.0 for v in row])
    merged = []
    for column in zip(*trimmed, strict=True):
        total = math.fsum(w * v for w, v in zip(weights, column, strict=True))
        sign = 1 if total >= 0 else -1
        agreeing = [(w, v) for w, v in zip(weights, column, strict=True) if v * sign > 0]
        share = math.fsum(w for w, _ in agreeing)
        merged.append(math.fsum(w * v for w, v in agreeing) / share if share else 0.0)
    return torch.tensor(merged)


def test_mean_and_task_arithmetic_are_the_sums_they_say() -> None:
    deltas_CD = deltas()
    expected = sum(float(w) * d for w, d in zip(WEIGHTS, deltas_CD, strict=True))
    torch.testing.assert_close(task_arithmetic(deltas_CD, WEIGHTS), expected)
    torch.testing.assert_close(mean(deltas_CD, WEIGHTS), expected / 8.0)
    torch.testing.assert_close(FEDIT(deltas_CD, WEIGHTS), expected / 8.0)


def test_task_arithmetic_forgets_with_a_negative_weight() -> None:
    deltas_CD = deltas(2)
    merged_D = TASK_ARITHMETIC(deltas_CD, torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(merged_D, deltas_CD[0] - deltas_CD[1])


@of_any_kind
@pytest.mark.parametrize("density", [0.004, 0.1, 0.2, 0.5, 1.0])
def test_ties_is_the_loop(density: float, case: str) -> None:
    deltas_CD = ADVERSARIAL[case](deltas())
    merged_D = TIES(deltas_CD, WEIGHTS, TiesConfig(density=density))
    expected_D = naive_ties(deltas_CD, WEIGHTS.tolist(), max(1, int(density * 211)))
    torch.testing.assert_close(merged_D, expected_D)
    assert bool(merged_D.any()) == (case != "zeros")


def test_ties_keeps_all_entries_tied_with_the_last_one_kept() -> None:
    deltas_CD = torch.tensor([[2.0, -1.0, 1.0, 1.0, 0.5, 0.0]])
    merged_D = TIES(deltas_CD, torch.ones(1), TiesConfig(density=2 / 6))
    assert merged_D.tolist() == [2.0, -1.0, 1.0, 1.0, 0.0, 0.0]


def test_ties_with_fewer_non_zero_entries_than_the_density_keeps_those() -> None:
    deltas_CD = torch.tensor([[0.0, 0.0, -3.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    merged_D = TIES(deltas_CD, torch.ones(2), TiesConfig(density=0.75))
    assert merged_D.tolist() == [0.0, 1.0, -3.0, 0.0]


def test_ties_elects_plus_when_the_sum_is_zero() -> None:
    merged_D = TIES(torch.tensor([[1.0], [-1.0]]), torch.ones(2), TiesConfig(density=1.0))
    assert merged_D.tolist() == [1.0]


def test_ties_counts_weights_in_the_election() -> None:
    deltas_CD = torch.tensor([[1.0], [1.0], [-1.5]])
    config = TiesConfig(density=1.0)
    assert TIES(deltas_CD, torch.tensor([1.0, 1.0, 1.0]), config).tolist() == [1.0]
    assert TIES(deltas_CD, torch.tensor([1.0, 1.0, 4.0]), config).tolist() == [-1.5]


def test_ties_takes_the_thresholds_it_is_given() -> None:
    deltas_CD = torch.tensor([[3.0, 2.0, 1.0], [0.3, 0.2, 0.1]])
    merged_D = ties(
        deltas_CD, torch.ones(2), TiesConfig(density=0.1), thresholds_C=torch.tensor([2.0, 0.2])
    )
    torch.testing.assert_close(merged_D, torch.tensor([1.65, 1.1, 0.0]))


@pytest.mark.parametrize("merge", [dare_linear, dare_ties])
def test_dare_drops_rescales_and_merges(merge: object) -> None:
    deltas_CD = deltas()
    keep_CD = torch.rand(5, 211, generator=torch.Generator().manual_seed(3)) < 0.3
    sparse_CD = torch.where(keep_CD, deltas_CD / 0.3, torch.zeros(()))
    config = DareConfig(density=0.3)
    if merge is dare_linear:
        expected_D = (WEIGHTS.float()[:, None] * sparse_CD).sum(0) / 8.0
        merged_D = dare_linear(deltas_CD, WEIGHTS, config, keep_CD=keep_CD)
    else:
        expected_D = naive_ties(sparse_CD, WEIGHTS.tolist(), 211)
        merged_D = dare_ties(deltas_CD, WEIGHTS, config, keep_CD=keep_CD)
    torch.testing.assert_close(merged_D, expected_D)


def test_dare_is_unbiased_over_seeds_and_repeats_for_one() -> None:
    deltas_CD = torch.ones(2, 400)
    merged = [
        DARE_LINEAR(deltas_CD, None, DareConfig(density=0.25, seed=seed)) for seed in range(200)
    ]
    # One entry of the mean has variance (1/ρ − 1)/2 = 1.5; the mean of 80,000 is within 5σ of 1.
    assert abs(float(torch.stack(merged).mean()) - 1) < 5 * math.sqrt(1.5 / 80_000)
    assert torch.equal(merged[7], DARE_LINEAR(deltas_CD, None, DareConfig(density=0.25, seed=7)))
    assert not torch.equal(merged[7], merged[8])


def test_dare_at_density_one_is_the_plain_method() -> None:
    deltas_CD = deltas()
    torch.testing.assert_close(
        DARE_LINEAR(deltas_CD, WEIGHTS, DareConfig(density=1.0)), MEAN(deltas_CD, WEIGHTS)
    )
    torch.testing.assert_close(
        DARE_TIES(deltas_CD, WEIGHTS, DareConfig(density=1.0)),
        TIES(deltas_CD, WEIGHTS, TiesConfig(density=1.0)),
    )


@of_any_kind
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_median_is_the_middle_or_the_mean_of_the_middle_two(count: int, case: str) -> None:
    deltas_CD = ADVERSARIAL[case](deltas(count))
    rows = [sorted(column) for column in zip(*deltas_CD.tolist(), strict=True)]
    expected_D = torch.tensor([(row[(count - 1) // 2] + row[count // 2]) / 2 for row in rows])
    torch.testing.assert_close(median(deltas_CD), expected_D)


@of_any_kind
@pytest.mark.parametrize(("trim", "dropped"), [(0, 0), (1, 1), (2, 2), (0.2, 1), (0.45, 2)])
def test_trimmed_mean_drops_both_ends(trim: float, dropped: int, case: str) -> None:
    deltas_CD = ADVERSARIAL[case](deltas())
    rows = [sorted(column) for column in zip(*deltas_CD.tolist(), strict=True)]
    expected_D = torch.tensor(
        [math.fsum(row[dropped : 5 - dropped]) / (5 - 2 * dropped) for row in rows]
    )
    merged_D = trimmed_mean(deltas_CD, None, TrimmedMeanConfig(trim=trim))
    torch.testing.assert_close(merged_D, expected_D)


def test_trimmed_mean_refuses_to_drop_everything() -> None:
    with pytest.raises(ValueError, match=r"trim: dropping 2 at each end .* of 4 .* 1 or less"):
        trimmed_mean(deltas(4), None, TrimmedMeanConfig(trim=2))


def naive_krum(deltas_CD: Tensor, f: int, m: int) -> Tensor:
    rows = deltas_CD.double()
    scores = []
    for i, mine in enumerate(rows):
        near = sorted(
            float((mine - other).square().sum()) for j, other in enumerate(rows) if j != i
        )
        scores.append((math.fsum(near[: len(rows) - f - 2]), i))
    chosen = [i for _, i in sorted(scores)[:m]]
    return rows[chosen].mean(0).float()


@of_any_kind
@pytest.mark.parametrize(("f", "m"), [(0, None), (1, None), (2, 1), (2, 3), (3, 9)])
def test_multi_krum_is_the_loop(f: int, m: int | None, case: str) -> None:
    deltas_CD = ADVERSARIAL[case](deltas(9))
    merged_D = multi_krum(deltas_CD, None, MultiKrumConfig(f=f, m=m))
    torch.testing.assert_close(merged_D, naive_krum(deltas_CD, f, m or 9 - f))


def test_multi_krum_leaves_out_those_far_away() -> None:
    deltas_CD = deltas(9)
    deltas_CD[2] += 50
    deltas_CD[5] -= 50
    honest = [0, 1, 3, 4, 6, 7, 8]
    merged_D = MULTI_KRUM(deltas_CD, None, MultiKrumConfig(f=2))
    torch.testing.assert_close(merged_D, deltas_CD[honest].mean(0))


def test_multi_krum_refuses_too_few_contributions() -> None:
    with pytest.raises(ValueError, match="2 malicious need at least 7 contributions, there are 6"):
        multi_krum(deltas(6), None, MultiKrumConfig(f=2))
    with pytest.raises(ValueError, match="m: 8 of 7 contributions"):
        multi_krum(deltas(7), None, MultiKrumConfig(f=2, m=8))


def test_geometric_median_has_no_better_point_near_it() -> None:
    deltas_CD = deltas(7, 30)
    point_D = geometric_median(deltas_CD).double()

    def cost(z_D: Tensor) -> float:
        return float((deltas_CD.double() - z_D).norm(dim=1).sum())

    # At the optimum the unit vectors towards the contributions cancel.
    towards_CD = deltas_CD.double() - point_D
    gradient_D = (towards_CD / towards_CD.norm(dim=1, keepdim=True)).sum(0)
    assert float(gradient_D.norm()) < 1e-5
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step_D = torch.randn(30, generator=generator, dtype=torch.float64)
        assert cost(point_D) <= cost(point_D + 1e-3 * step_D)


def test_geometric_median_is_weiszfeld_on_the_vectors_themselves() -> None:
    deltas_CD = deltas(6, 40).double()
    distances_CC = torch.cdist(deltas_CD, deltas_CD)
    start_C = 1 / distances_CC.median(dim=1).values
    point_D = (start_C[:, None] * deltas_CD).sum(0) / start_C.sum()
    for _ in range(3):
        inverse_C = 1 / (deltas_CD - point_D).norm(dim=1).clamp(min=0.1)
        point_D = (inverse_C[:, None] * deltas_CD).sum(0) / inverse_C.sum()
    config = GeometricMedianConfig(nu=0.1, iterations=3, tolerance=0)
    merged_D = GEOMETRIC_MEDIAN(deltas_CD.float(), None, config)
    torch.testing.assert_close(merged_D, point_D.float())


def test_geometric_median_stays_with_the_majority() -> None:
    deltas_CD = deltas(9) * 0.01
    honest_D = deltas_CD[:6].mean(0)
    deltas_CD[6:] += 1e4
    assert float((geometric_median(deltas_CD) - honest_D).norm()) < 0.5


@pytest.mark.parametrize("factor", [1e3, 1e15, 1e20, 1e25, 1e35])
def test_geometric_median_does_not_depend_on_how_far_the_others_are(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    honest_CD = 1 + 0.1 * torch.randn(7, 400, generator=generator)
    far_CD = torch.randn(2, 400, generator=generator)
    found, near = (
        geometric_median(torch.cat([honest_CD[:3], size * far_CD, honest_CD[3:]]))
        for size in (factor, 1e6)
    )
    # Only through the direction of those far away, which is the same, do they pull.
    torch.testing.assert_close(found, near, atol=1e-3, rtol=1e-3)


def test_geometric_median_of_equal_contributions_is_theirs() -> None:
    deltas_CD = deltas(1).expand(4, -1)
    torch.testing.assert_close(geometric_median(deltas_CD), deltas_CD[0])


def test_small_distances_between_large_vectors_survive() -> None:
    """The trap: in fp32 a true squared distance of .4 came out as 10 to 58."""
    common_D = 10 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    deltas_CD = common_D + 1e-3 * torch.randn(3, 100_000, generator=generator)
    truth = float((deltas_CD[0].double() - deltas_CD[1].double()).square().sum())
    found = float(squared_distances(inner_products(deltas_CD))[0, 1])
    assert found == pytest.approx(truth, rel=1e-4)
    in_fp32 = squared_distances((deltas_CD @ deltas_CD.T).double())[0, 1]
    assert abs(float(in_fp32) - truth) > 0.5 * truth


def test_robust_methods_ignore_what_clients_claim_to_weigh() -> None:
    deltas_CD = deltas(7)
    claimed = torch.tensor([1.0, 1, 1, 1, 1, 1, 1e6])
    for name in ("median", "trimmed_mean", "multi_krum", "geometric_median", "rank_vote"):
        method = next(m for m in BUILT_IN if m.name == name)
        assert torch.equal(method(deltas_CD, claimed), method(deltas_CD)), name


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0, 1.0], "2 for 5 contributions"),
        ([1.0, 1, 1, 1, float("nan")], "not all finite"),
        ([1.0, 1, 1, 1, -1], "zero or more"),
        ([0.0, 0, 0, 0, 0], "one of them above zero"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MEAN(deltas(), torch.tensor(weights))


@pytest.mark.parametrize("method", BUILT_IN)
def test_entries_that_cannot_be_merged_are_refused(method: MergeMethod) -> None:
    for wrong in (math.nan, math.inf):
        deltas_CD = deltas()
        deltas_CD[3, 100] = wrong
        with pytest.raises(ValueError, match=r"^contribution 3 holds numbers that are not finite"):
            method(deltas_CD)
    with pytest.raises(ValueError, match=r"^contribution 0 holds torch\.int64; give floating"):
        method(torch.ones(5, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TiesConfig, {"density": 0.0}),
        (TiesConfig, {"density": 1.1}),
        (TiesConfig, {"scope": "galaxy"}),
        (DareConfig, {"density": 0}),
        (TrimmedMeanConfig, {"trim": -1}),
        (TrimmedMeanConfig, {"trim": 0.5}),
        (MultiKrumConfig, {"f": -1}),
        (GeometricMedianConfig, {"nu": 0}),
        (MEDIAN.config, {"extra": 1}),
    ],
)
def test_parameters_out_of_range_are_refused(config: type, values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(**values)


def test_a_method_says_how_it_merges_once() -> None:
    with pytest.raises(ValueError, match="exactly one of merge, coefficients and matrices"):
        MergeMethod(name="none", config=TiesConfig, scope="entry")


def test_what_a_method_gathers_must_make_sense() -> None:
    with pytest.raises(ValueError, match="statistic far: give a count to kth"):
        Statistic("far", entries_as_they_are, "kth")
    with pytest.raises(ValueError, match="method odd: what it gathers is taken over a tensor"):
        MergeMethod(
            name="odd",
            config=MEDIAN.config,
            scope="entry",
            merge=median,
            statistics=TIES.statistics,
        )
    with pytest.raises(ValueError, match="name one thing twice"):
        MergeMethod(
            name="odd",
            config=MEDIAN.config,
            scope="tensor",
            merge=median,
            statistics=TIES.statistics * 2,
        )
    with pytest.raises(ValueError, match="handed to a merge of entries"):
        replace(MEAN, draws=DARE_LINEAR.draws)

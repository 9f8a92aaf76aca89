"""Signed-rank voting against a loop, and what nobody can do to it."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.engine.whole_module import WholeModule
from anabranch.aggregation.methods.rank_vote import RANK_VOTE, RankVoteConfig
from anabranch.aggregation.ranking import tally
from anabranch.aggregation.whole import InMemory
from anabranch.simulation.attacks.attack import View
from anabranch.simulation.attacks.vem import VemConfig, vem
from anabranch.vectors import LowRank, TaskVector

CLIENTS, ENTRIES = 7, 240


def honest(count: int = CLIENTS, entries: int = ENTRIES, seed: int = 0) -> Tensor:
    """Contributions with something in common."""
    generator = torch.Generator().manual_seed(seed)
    common_D = torch.randn(entries, generator=generator)
    return common_D + torch.randn(count, entries, generator=generator)


def shared_places(keys: list[float]) -> list[float]:
    """The place of each key, from 0 on; equals share the mean of theirs."""
    ordered = sorted(keys)
    return [
        sum(place for place, other in enumerate(ordered) if other == key) / ordered.count(key)
        for key in keys
    ]


def naive_votes(rows: list[list[float]], approvals: float | None) -> list[float]:
    votes = [0.0] * len(rows[0])
    for row in rows:
        sizes = [abs(value) for value in row]
        ranks = [place + 1 for place in shared_places(sizes)]
        if approvals is not None:
            last = sorted(sizes, reverse=True)[max(1, int(approvals * len(sizes))) - 1]
            ranks = [float(size >= last) for size in sizes]
        for entry, (value, rank) in enumerate(zip(row, ranks, strict=True)):
            votes[entry] += ((value > 0) - (value < 0)) * rank
    return votes


def naive(rows: list[list[float]], density: float, approvals: float | None) -> list[float]:
    votes = naive_votes(rows, approvals)
    sizes = [abs(vote) for vote in votes]
    curves = [sorted(abs(value) for value in row) for row in rows]
    curve = [median(values) for values in zip(*curves, strict=True)]
    ordered = sorted(sizes)
    worth = {
        size: sum(v for v, s in zip(curve, ordered, strict=True) if s == size) / ordered.count(size)
        for size in set(ordered)
    }
    least = sorted(sizes, reverse=True)[max(1, int(density * len(sizes))) - 1]
    return [((vote > 0) - (vote < 0)) * worth[abs(vote)] * (abs(vote) >= least) for vote in votes]


@pytest.mark.parametrize("approvals", [None, 0.2, 1.0])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("coarse", [False, True])
def test_it_is_the_loop(coarse: bool, density: float, approvals: float | None) -> None:
    deltas_CD = honest()
    if coarse:  # ties, and zeros, which abstain
        deltas_CD = (deltas_CD * 2).round() / 4
    found = RANK_VOTE(deltas_CD, None, RankVoteConfig(density=density, approvals=approvals))
    wanted = naive(deltas_CD.tolist(), density, approvals)
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert 0 < int(found.count_nonzero()) <= ENTRIES


def test_a_contributions_size_matters_to_the_median_alone() -> None:
    deltas_CD = honest()
    before = RANK_VOTE(deltas_CD)
    sizes_C = deltas_CD.abs().sum(1)
    largest, least = int(sizes_C.argmax()), int(sizes_C.argmin())
    grown_CD, moved_CD = deltas_CD.clone(), deltas_CD.clone()
    grown_CD[largest] *= 1e6
    moved_CD[least] *= 1e6
    # Whoever was the smallest and is the largest now moves the median by one place, and no votes.
    moved = RANK_VOTE(moved_CD)
    assert torch.equal(moved.sign(), before.sign())
    curves_CD = deltas_CD.abs().sort().values.sort(0).values
    assert float(moved.abs().max()) <= float(curves_CD[CLIENTS // 2 + 1].max())
    grown = RANK_VOTE(grown_CD)
    assert torch.equal(grown.sign(), before.sign())
    assert float(grown.abs().max()) <= float(curves_CD[CLIENTS // 2 + 1].max())
    # Where the curves do not cross, the largest is above the median at every place already.
    alike_CD = deltas_CD[:1].repeat(CLIENTS, 1) * torch.arange(1.0, CLIENTS + 1)[:, None]
    again_CD = alike_CD.clone()
    again_CD[-1] *= 1e6
    assert torch.equal(RANK_VOTE(again_CD), RANK_VOTE(alike_CD))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([0.1, 0.3, 1.0]),
    st.sampled_from(["against", "random", "one", "same"]),
    st.integers(0, 2**31),
)
def test_f_colluders_turn_no_entry_of_which_more_than_f_honest_approve(
    f: int, approvals: float, attack: str, seed: int
) -> None:
    honest_CD = honest(f + 3, 60, seed)
    votes_D = torch.tensor(naive_votes(honest_CD.tolist(), approvals))
    generator = torch.Generator().manual_seed(seed + 1)
    attacks = {
        "against": -votes_D * 1e9,
        "random": torch.randn(60, generator=generator),
        "one": torch.eye(60)[int(votes_D.abs().argmax())] * -1e30,
        "same": -torch.ones(60),
    }
    bad_CD = attacks[attack].expand(f, -1)
    config = RankVoteConfig(density=1.0, approvals=approvals)
    merged_D = RANK_VOTE(torch.cat([honest_CD, bad_CD]), None, config)
    sure_D = votes_D.abs() > f
    assert torch.equal(merged_D.sign()[sure_D], votes_D.sign()[sure_D])
    # And fewer than half make nothing larger than the largest honest entry.
    assert float(merged_D.abs().max()) <= float(honest_CD.abs().max()) * (1 + 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**31))
def test_f_colluders_turn_no_entry_whose_ranks_are_beyond_theirs(f: int, seed: int) -> None:
    honest_CD = honest(3 * f + 4, 60, seed)
    votes_D = torch.tensor(naive_votes(honest_CD.tolist(), None))
    merged_D = RANK_VOTE(
        torch.cat([honest_CD, (-votes_D * 1e9).expand(f, -1)]), None, RankVoteConfig(density=1.0)
    )
    sure_D = votes_D.abs() > f * 60
    assert torch.equal(merged_D.sign()[sure_D], votes_D.sign()[sure_D])


def test_ranks_bound_an_attack_less_than_approvals_do() -> None:
    """Two of seven who put all their rank on the entries of least honest margin."""
    honest_CD = honest(5)
    votes_D = torch.tensor(naive_votes(honest_CD.tolist(), None))
    order_D = torch.arange(1.0, ENTRIES + 1)
    bad_D = torch.empty(ENTRIES).scatter_(0, votes_D.abs().argsort(descending=True), order_D)
    attacked_CD = torch.cat([honest_CD, (-bad_D * votes_D.sign()).expand(2, -1)])

    def turned(approvals: float | None) -> int:
        config = RankVoteConfig(density=1.0, approvals=approvals)
        clean_D = RANK_VOTE(honest_CD, None, RankVoteConfig(density=1.0, approvals=approvals))
        return int((RANK_VOTE(attacked_CD, None, config) * clean_D < 0).sum())

    assert turned(None) > 2 * turned(0.2)


def test_what_vem_turns_at_two_of_ten_is_not_kept() -> None:
    honest_CD = honest(8, 4000)
    view = View(lambda: honest_CD.double(), 2, 4000, torch.Generator().manual_seed(0))
    bad_D = vem(view, VemConfig()).float()
    attacked_CD = torch.cat([honest_CD, bad_D.expand(2, -1)])
    turned = {
        density: RANK_VOTE(attacked_CD, None, config) * RANK_VOTE(honest_CD, None, config) < 0
        for density in (1.0, 0.5)
        if (config := RankVoteConfig(density=density))
    }
    assert float(turned[1.0].float().mean()) > 0.3
    assert not turned[0.5].any()


def test_votes_are_whole_numbers_and_curves_do_not_depend_on_what_fits_at_once() -> None:
    deltas_CD = honest()

    class Narrow(InMemory):
        side_by_side = 50

    def vote(entries_L: Tensor, order_L: Tensor, places_L: Tensor, sorted_D: Tensor) -> Tensor:
        return places_L

    votes_D, curve_D = tally(InMemory(deltas_CD), Tensor.abs, vote)
    again_D, same_D = tally(Narrow(deltas_CD), Tensor.abs, vote)
    assert votes_D.dtype == torch.int64
    assert torch.equal(votes_D, again_D)
    assert torch.equal(curve_D, same_D)
    assert torch.equal(curve_D, deltas_CD.abs().sort().values.median(0).values)
    # Two votes a place: nobody has more to say than anybody else.
    assert int(votes_D.sum()) == CLIENTS * ENTRIES * (ENTRIES - 1)


def test_a_module_that_does_not_fit_is_refused_and_others_are_sorted_for_again() -> None:
    cohort = [
        TaskVector({"m": LowRank(torch.randn(64, 2), torch.randn(2, 50))}) for _ in range(CLIENTS)
    ]
    needed = 2 * 64 * 50 * 4 * 16
    recipe = Recipe(method="rank_vote")
    with pytest.raises(ValueError, match=f"cannot hold m of one .* allow at least {needed}$"):
        merge_task_vectors(cohort, recipe, budget_bytes=needed - 1)
    formed = []
    form = WholeModule.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeModule, "__iter__", lambda self: (formed.append(1), form(self))[1])
        tight = merge_task_vectors(cohort, recipe, budget_bytes=needed)
    # 16 fp32 copies of a tensor are room for that of seven, 4 bytes each, in one stretch.
    assert len(formed) == 1
    roomy = merge_task_vectors(cohort, recipe)
    assert torch.equal(tight.deltas["m"], roomy.deltas["m"])  # type: ignore[arg-type]

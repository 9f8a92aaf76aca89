"""Attacks on vectors against the papers' formulas, written as loops."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.methods.mean import MEAN
from anabranch.aggregation.methods.median import MEDIAN
from anabranch.aggregation.methods.multi_krum import MULTI_KRUM
from anabranch.aggregation.methods.rank_vote import RANK_VOTE
from anabranch.simulation.attacks import (
    ADAPTIVE,
    ALIE,
    BUILT_IN,
    FREE_RIDER,
    GAUSSIAN,
    IPM,
    MIMIC,
    MIN_MAX,
    MIN_SUM,
    SIGN_FLIP,
    SYBIL,
    VEM,
)
from anabranch.simulation.attacks.adaptive import AdaptiveConfig
from anabranch.simulation.attacks.directions import Direction
from anabranch.simulation.attacks.free_rider import FreeRiderConfig
from anabranch.simulation.attacks.gaussian import GaussianConfig
from anabranch.simulation.attacks.ipm import IpmConfig
from anabranch.simulation.attacks.mimic import MimicConfig
from anabranch.simulation.attacks.min_max import MinMaxConfig
from anabranch.simulation.attacks.min_sum import MinSumConfig
from anabranch.simulation.attacks.sign_flip import SignFlipConfig
from anabranch.simulation.attacks.sybil import SybilConfig
from anabranch.simulation.attacks.vem import honest_votes, turning_ranks

DIRECTIONS: tuple[Direction, ...] = ("unit", "sign", "std")


def honest(count: int = 7, entries: int = 40, seed: int = 0, offset: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common_D = offset * torch.randn(entries, generator=generator)
    return common_D + 0.5 * torch.randn(count, entries, generator=generator)


def naive_mean(honest_HD: Tensor) -> Tensor:
    return torch.tensor([sum(column) / len(column) for column in honest_HD.T.tolist()]).double()


def test_every_attack_sends_a_finite_vector_for_each_colluder_and_leaves_what_it_sees() -> None:
    honest_HD = honest()
    before = honest_HD.clone()
    for attack in BUILT_IN:
        sent_fD = attack(honest_HD, 3, rule=MEDIAN, previous_D=honest_HD[0])
        assert sent_fD.shape == (3, 40)
        assert sent_fD.dtype == torch.float32
        assert bool(sent_fD.isfinite().all()), attack.name
        assert torch.equal(sent_fD, attack(honest_HD, 3, rule=MEDIAN, previous_D=honest_HD[0]))
        assert attack(honest_HD, 0, rule=MEDIAN).shape == (0, 40)
        assert torch.equal(honest_HD, before)
    assert len({attack.name for attack in BUILT_IN}) == len(BUILT_IN)


def test_those_on_the_mean_and_the_spread_are_their_formulas() -> None:
    honest_HD = honest()
    for entry, column in enumerate(honest_HD.T.double().tolist()):
        mean = sum(column) / len(column)
        std = math.sqrt(sum((value - mean) ** 2 for value in column) / len(column))
        for attack, config, wanted in (
            (SIGN_FLIP, SignFlipConfig(scale=10), -10 * mean),
            (ALIE, None, mean - 1.5 * std),
            (IPM, IpmConfig(epsilon=2), -2 * mean),
        ):
            found = float(attack(honest_HD, 2, config)[1, entry])
            assert found == pytest.approx(wanted, abs=1e-5), attack.name


def test_a_sign_flip_of_ones_own_needs_no_sight_of_others() -> None:
    own_fD = honest(2, seed=4)
    sent_fD = SIGN_FLIP(honest(), 2, SignFlipConfig(scale=3, of="own"), own_fD=own_fD)
    assert torch.equal(sent_fD, -3 * own_fD)
    with pytest.raises(ValueError, match="needs what the colluders trained; give own_fD"):
        SIGN_FLIP(honest(), 2, SignFlipConfig(of="own"))


@pytest.mark.parametrize("per", ["one", "honest"])
def test_noise_has_its_deviation_and_differs_by_colluder_and_seed(per: str) -> None:
    honest_HD = honest(entries=20_000, offset=0.0)
    config = GaussianConfig.model_validate({"std": 3.0, "per": per})
    sent_fD = GAUSSIAN(honest_HD, 2, config, seed=5)
    unit = 1.0 if per == "one" else math.sqrt(float((honest_HD**2).mean()))
    assert float(sent_fD.std()) == pytest.approx(3 * unit, rel=0.02)
    assert abs(float(sent_fD.mean())) < 0.05 * unit
    assert abs(float(torch.corrcoef(sent_fD)[0, 1])) < 0.03
    assert not torch.equal(sent_fD, GAUSSIAN(honest_HD, 2, config, seed=6))


def perturbation(honest_HD: Tensor, kind: Direction) -> Tensor:
    """As the paper has it, of any length: γ makes up for it."""
    wide_HD = honest_HD.double()
    mean_D = wide_HD.mean(dim=0)
    return {"unit": -mean_D / mean_D.norm(), "sign": -mean_D.sign(), "std": -wide_HD.std(dim=0)}[
        kind
    ]


def bisected(honest_HD: Tensor, towards_D: Tensor, kind: str, bound: str) -> Tensor:
    """The released code's search: from γ = 10 in halving steps, by the distances themselves."""
    wide_HD = honest_HD.double()
    mean_D = wide_HD.mean(dim=0)
    pairs_HH = torch.tensor(
        [[float(((a - b) ** 2).sum()) for b in wide_HD] for a in wide_HD], dtype=torch.float64
    )
    if kind == "max":
        most = float(pairs_HH.max())
    else:
        sums_H = pairs_HH.sum(dim=1)
        most = float(sums_H.min() if bound == "least" else sums_H.max())
    gamma, step, good = 10.0, 10.0, 0.0
    while abs(good - gamma) > 1e-9:
        distances_H = ((mean_D + gamma * towards_D - wide_HD) ** 2).sum(dim=1)
        reached = float(distances_H.max() if kind == "max" else distances_H.sum())
        if reached <= most:
            good = gamma
            gamma += step / 2
        else:
            gamma -= step / 2
        step /= 2
    return mean_D + good * towards_D


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_min_max_is_what_bisection_comes_to(kind: Direction, seed: int) -> None:
    honest_HD = honest(seed=seed)
    found = MIN_MAX(honest_HD, 2, MinMaxConfig(direction=kind))
    wanted = bisected(honest_HD, perturbation(honest_HD, kind), "max", "")
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("bound", ["least", "largest"])
def test_min_sum_is_what_bisection_comes_to(kind: Direction, bound: str) -> None:
    honest_HD = honest(seed=3)
    config = MinSumConfig.model_validate({"direction": kind, "bound": bound})
    found = MIN_SUM(honest_HD, 2, config)
    wanted = bisected(honest_HD, perturbation(honest_HD, kind), "sum", bound)
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("far", [1e3, 1e6])
def test_a_far_mean_costs_the_search_no_digits(far: float) -> None:
    """Honest spread 0.5 around a mean of 1e6: entries of γ·p are a ten-millionth of the mean's."""
    honest_HD = honest().double() + far
    sent_D = MIN_MAX.sent(_view(honest_HD), MinMaxConfig(direction="std")).double()[0]
    exact_D = bisected(honest_HD, perturbation(honest_HD, "std"), "max", "")
    torch.testing.assert_close(sent_D, exact_D, atol=far * 1e-7, rtol=0)


def _view(honest_HD: Tensor) -> object:
    from anabranch.simulation.attacks.attack import View

    return View(lambda: honest_HD, 1, honest_HD.shape[1], torch.Generator())


@pytest.mark.parametrize("attack", [MIN_MAX, MIN_SUM, ALIE, ADAPTIVE], ids=lambda one: one.name)
def test_equal_honest_contributions_leave_no_room_to_hide(attack: object) -> None:
    honest_HD = honest(1).expand(5, -1)
    if attack is ADAPTIVE:
        sent_fD = ADAPTIVE(honest_HD, 1, rule=lambda everyone: everyone.median(dim=0).values)
        assert bool(sent_fD.isfinite().all())
        return
    torch.testing.assert_close(attack(honest_HD, 1)[0], honest_HD[0], atol=1e-6, rtol=1e-6)  # type: ignore[operator]


def test_mimic_copies_who_lies_furthest_where_the_honest_differ_most() -> None:
    honest_HD = honest()
    away_HD = honest_HD.double() - naive_mean(honest_HD)
    _, _, right_DD = torch.linalg.svd(away_HD)
    along = [abs(float(one_D.double() @ right_DD[0])) for one_D in honest_HD]
    furthest = max(range(len(along)), key=lambda index: along[index])
    assert torch.equal(MIMIC(honest_HD, 2)[1], honest_HD[furthest])
    assert torch.equal(MIMIC(honest_HD, 2, MimicConfig(target=3))[0], honest_HD[3])
    with pytest.raises(ValueError, match="target 7 is none of the 7 honest contributions"):
        MIMIC(honest_HD, 2, MimicConfig(target=7))


def test_a_free_rider_sends_nothing_or_the_last_change_under_noise() -> None:
    previous_D = 5 + torch.randn(20_000, generator=torch.Generator().manual_seed(2))
    honest_HD = honest(entries=20_000)
    assert not FREE_RIDER(honest_HD, 2, FreeRiderConfig(sends="zero"), previous_D=previous_D).any()
    assert not FREE_RIDER(honest_HD, 2).any()  # there was no round before
    noise_fD = FREE_RIDER(honest_HD, 2, FreeRiderConfig(noise=0.2), previous_D=previous_D)
    noise_fD = noise_fD - previous_D
    root = math.sqrt(float((previous_D**2).mean()))
    assert float(noise_fD.std()) == pytest.approx(0.2 * root, rel=0.02)
    assert not torch.equal(noise_fD[0], noise_fD[1])


def test_sybils_send_one_update_under_all_names() -> None:
    own_fD = honest(3, entries=20_000, seed=9)
    honest_HD = honest(entries=20_000)
    same_fD = SYBIL(honest_HD, 3, SybilConfig(scale=2), own_fD=own_fD)
    assert torch.equal(same_fD, 2 * own_fD[:1].expand(3, -1))
    jittered_fD = SYBIL(honest_HD, 3, SybilConfig(jitter=0.3), own_fD=own_fD)
    cosine = torch.cosine_similarity(jittered_fD[0], jittered_fD[1], dim=0)
    assert float(cosine) == pytest.approx(1 / (1 + 0.3**2), abs=0.02)
    drawn_fD = SYBIL(honest_HD, 3, seed=1)
    assert float(drawn_fD[0].norm()) == pytest.approx(float(honest_HD.norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("rule", [MEDIAN, MULTI_KRUM], ids=lambda rule: rule.name)
def test_the_adaptive_attack_does_more_harm_than_those_that_do_not_ask_the_rule(
    rule: object,
) -> None:
    honest_HD = honest(9)

    def harm(sent_fD: Tensor) -> float:
        moved_D = rule(torch.cat([honest_HD, sent_fD])) - honest_HD.mean(dim=0)  # type: ignore[operator]
        return float(moved_D.norm())

    adaptive = harm(ADAPTIVE(honest_HD, 3, rule=rule))  # type: ignore[arg-type]
    for attack in BUILT_IN:
        if not attack.needs_rule and attack not in (MIMIC, SYBIL):  # no direction of the search
            assert adaptive >= harm(attack(honest_HD, 3)) - 1e-4, attack.name
    assert adaptive > 1.05 * harm(honest_HD.mean(dim=0).expand(3, -1))


def test_the_line_search_finds_the_largest_harm_on_a_fine_grid() -> None:
    """A rule that drops what lies further off than 3: the worst is just below it."""
    honest_HD = honest(8, offset=0.3)

    def rule(everyone_ND: Tensor) -> Tensor:
        near = (everyone_ND - everyone_ND.median(dim=0).values).norm(dim=1) < 6
        return everyone_ND[near].mean(dim=0)

    mean_D = honest_HD.mean(dim=0)

    def harm(sent_D: Tensor) -> float:
        moved_D = rule(torch.cat([honest_HD, sent_D.expand(2, -1)])) - mean_D
        return float(moved_D.norm())

    towards_D = -mean_D / mean_D.norm()
    grid = [harm(mean_D + 0.005 * step * towards_D) for step in range(0, 4000, 4)]
    config = AdaptiveConfig(directions=("unit",), points=40, refinements=20)
    assert harm(ADAPTIVE(honest_HD, 2, config, rule=rule)[0]) > 0.99 * max(grid)


def most_turned(needed: list[int], ranks: list[int]) -> int:
    """The most entries any way of giving out the ranks turns, by trying them all."""
    return max(
        sum(rank >= need for need, rank in zip(needed, given, strict=True))
        for given in permutations(ranks)
    )


@pytest.mark.parametrize("seed", range(5))
def test_vem_gives_out_ranks_so_that_the_most_entries_turn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    needed_D = torch.randint(1, 9, (6,), generator=generator)
    ranks_D = turning_ranks(needed_D)
    assert sorted(ranks_D.tolist()) == [1, 2, 3, 4, 5, 6]
    turned = int((ranks_D >= needed_D).sum())
    assert turned == most_turned(needed_D.tolist(), [1, 2, 3, 4, 5, 6])


def test_vem_turns_more_of_a_rank_vote_than_a_sign_flip_of_any_size() -> None:
    honest_HD = honest(8, entries=300, offset=0.3, seed=2)
    config = RANK_VOTE.config.model_validate({"density": 1.0})
    signs_D = RANK_VOTE(honest_HD, config=config).sign()

    def turned(sent_fD: Tensor) -> int:
        merged_D = RANK_VOTE(torch.cat([honest_HD, sent_fD]), config=config)
        return int((merged_D.sign() == -signs_D).sum())

    mine = VEM(honest_HD, 2)
    flips = [turned(SIGN_FLIP(honest_HD, 2, SignFlipConfig(scale=scale))) for scale in (1, 100)]
    assert turned(mine) > 1.3 * max(flips) > 0
    norms_H = honest_HD.norm(dim=1)
    assert float(norms_H.min()) < float(mine[0].norm()) < float(norms_H.max())
    # As many as the votes say: below f times the rank given.
    votes_D = honest_votes(honest_HD)
    ranks_D = mine[0].abs().argsort().argsort() + 1
    assert turned(mine) == int((votes_D.abs() < 2 * ranks_D).sum())


def test_the_goal_to_reverse_turns_a_mean_round() -> None:
    honest_HD = honest(6)
    config = AdaptiveConfig(goal="reverse")
    sent_fD = ADAPTIVE(honest_HD, 2, config, rule=MEAN)
    merged_D = MEAN(torch.cat([honest_HD, sent_fD]))
    assert float(merged_D @ honest_HD.mean(dim=0)) < 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"honest_HD": torch.zeros(4)}, r"honest contributions have shape \(4,\); give \[H, D\]"),
        ({"honest_HD": torch.zeros(0, 4)}, "with H of at least one"),
        ({"honest_HD": torch.full((2, 4), math.nan)}, "is not finite; leave it out"),
        ({"colluders": -1}, "-1 colluders; give none or more"),
        ({"own_fD": torch.zeros(2, 4)}, r"own_fD has shape \(2, 4\); give \(2, 40\)"),
        ({"previous_D": torch.zeros(4)}, r"previous_D has shape \(4,\); give \(40,\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=f"sign_flip: .*{reason}"):
        SIGN_FLIP(**{"honest_HD": honest(), "colluders": 2, **given})  # type: ignore[arg-type]


def test_an_attack_on_a_rule_needs_one() -> None:
    with pytest.raises(ValueError, match="must know how the coordinator merges; give a rule"):
        ADAPTIVE(honest(), 2)

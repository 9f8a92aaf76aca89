"""What a robust rule promises on any numbers: what it follows, and how far a minority moves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation.registry import methods
from anabranch.aggregation.robust import ARC, DEDUP, NNM
from anabranch.aggregation.robust.arc import ArcConfig
from anabranch.aggregation.robust.nnm import NnmConfig

Params = Callable[[int], dict[str, Any]]


def _f(f: int) -> dict[str, Any]:
    return {"f": f}


def _none(f: int) -> dict[str, Any]:
    return {}


RULES: Mapping[str, tuple[Params, Callable[[int], int], float]] = {
    "median": (_none, lambda f: 2 * f + 1, 4),
    "trimmed_mean": (lambda f: {"trim": f}, lambda f: 2 * f + 1, 6),
    "meamed": (_f, lambda f: 2 * f + 1, 6),
    "geometric_median": (_none, lambda f: 2 * f + 1, 4),
    "multi_krum": (_f, lambda f: 2 * f + 3, 6),
    "bulyan": (_f, lambda f: 4 * f + 3, 6),
    "mda": (_f, lambda f: 2 * f + 1, 6),
    "smea": (_f, lambda f: 2 * f + 1, 6),
    "caf": (_f, lambda f: 2 * f + 1, 6),
}
"""By rule that follows a translation: parameters at f, fewest contributions at f, and κ.

κ = b·(1 + f/(n − 2f))², with this b, bounds the squared error in units of the mean squared distance
of the honest from their mean: (f, κ)-robustness (Allouah et al., 2302.01772, table 1). It is theirs
for the medians and above theirs for Krum, the trimmed mean, MDA and SMEA. Meamed, Bulyan,
Multi-Krum and CAF are not in that table; the same is asked of them.
"""

AT_ZERO: Mapping[str, Params] = {
    "centred_clipping": _none,
    "flame": _none,
    "crfl": lambda f: {"sigma": 0.0},
    "fltrust": lambda f: {"root": "contribution 0"},
}
"""Rules that hold to where the round started: no minority brings them past the honest norms."""

OTHERS = {
    "dnc": "looks along one direction (test below)",
    "foolsgold": "withstands Sybils, and no single attacker",
    "sign_vote": "of signs: test_sign_vote.py",
}
"""Robust to what their papers say and not to whatever is sent."""

ATTACKS: Mapping[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "huge": lambda honest, f, g: 1e6 * torch.randn(f, honest.shape[1], generator=g),
    "far and alike": lambda honest, f, g: (
        30 * torch.randn(honest.shape[1], generator=g).expand(f, -1)
    ),
    "reversed": lambda honest, f, g: -3 * honest.mean(dim=0).expand(f, -1),
    "a little is enough": lambda honest, f, g: (
        honest.mean(dim=0) + 1.5 * honest.std(dim=0)
    ).expand(f, -1),
    "at the edge": lambda honest, f, g: (
        honest.mean(dim=0)
        + (3 * honest.std(dim=0).norm() * torch.eye(honest.shape[1])[0]).expand(f, -1)
    ),
    "one of the honest": lambda honest, f, g: honest[:1].expand(f, -1),
    "zeros": lambda honest, f, g: torch.zeros(f, honest.shape[1]),
}


@st.composite
def rounds(draw: st.DrawFn, fewest: Callable[[int], int]) -> tuple[Tensor, Tensor]:
    """Honest contributions around some point, and those of a minority."""
    f = draw(st.integers(1, 3))
    count = fewest(f) + draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    entries = draw(st.sampled_from([3, 20, 60]))
    centre_D = draw(st.sampled_from([0.0, 1.0, 50.0])) * torch.randn(entries, generator=generator)
    honest_HD = centre_D + torch.randn(count - f, entries, generator=generator)
    attack = ATTACKS[draw(st.sampled_from(sorted(ATTACKS)))]
    return honest_HD, attack(honest_HD, f, generator)


def merged(name: str, params: dict[str, Any], deltas_CD: Tensor) -> Tensor:
    method = methods()[name]
    return method(deltas_CD, None, method.config(**params))


def test_every_robust_rule_is_here() -> None:
    named = {*RULES, *AT_ZERO, *OTHERS}
    assert named <= methods().keys()
    with_f = {name for name, method in methods().items() if "f" in method.config.model_fields}
    assert with_f <= named


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_minority_moves_a_rule_by_no_more_than_the_honest_spread(
    name: str, data: st.DataObject
) -> None:
    params, fewest, most = RULES[name]
    honest_HD, evil_FD = data.draw(rounds(fewest))
    f = len(evil_FD)
    count = len(honest_HD) + f
    mean_D = honest_HD.mean(dim=0)
    spread = float((honest_HD - mean_D).square().sum(dim=1).mean())
    found_D = merged(name, params(f), torch.cat([honest_HD, evil_FD]))
    kappa = most * (1 + f / (count - 2 * f)) ** 2
    moved = float((found_D - mean_D).square().sum())
    assert moved <= kappa * spread * (1 + 1e-4), (moved / spread, kappa)


@pytest.mark.parametrize("name", AT_ZERO)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_minority_brings_a_rule_no_further_than_the_honest_go(
    name: str, data: st.DataObject
) -> None:
    honest_HD, evil_FD = data.draw(rounds(lambda f: 2 * f + 1))
    found_D = merged(name, AT_ZERO[name](len(evil_FD)), torch.cat([honest_HD, evil_FD]))
    largest = float(honest_HD.norm(dim=1).max())
    times = 3 if name == "centred_clipping" else 1
    assert float(found_D.norm()) <= times * largest * (1 + 1e-5)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_rule_follows_a_translation_and_no_order(name: str, data: st.DataObject) -> None:
    params, fewest, _ = RULES[name]
    honest_HD, evil_FD = data.draw(rounds(fewest))
    # Contributions of equal score are told apart by their order, and by rounding.
    evil_FD = evil_FD + torch.randn(evil_FD.shape, generator=torch.Generator().manual_seed(1))
    deltas_CD = torch.cat([honest_HD, evil_FD])
    f = len(evil_FD)
    found_D = merged(name, params(f), deltas_CD)
    unit = float(deltas_CD.abs().median())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    shift_D = unit * torch.randn(deltas_CD.shape[1], generator=generator)
    order = torch.randperm(len(deltas_CD), generator=generator)
    shifted_D = merged(name, params(f), deltas_CD + shift_D)
    # A huge outlier loses the last digits of the shift.
    loose = 1e-3 * unit if float(deltas_CD.abs().max()) > 1e4 else 1e-4 * unit
    torch.testing.assert_close(shifted_D, found_D + shift_D, atol=loose, rtol=1e-4)
    if name == "mda":
        # Groups that share their farthest pair are of one diameter, and the first of them is taken.
        return
    again_D = merged(name, params(f), deltas_CD[order])
    torch.testing.assert_close(again_D, found_D, atol=1e-4 * unit, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_mixing_and_clipping_keep_the_promise_of_what_follows(data: st.DataObject) -> None:
    """(f, κ)-robustness of a median after mixing: no worse than without (2302.01772, lemma 1)."""
    honest_HD, evil_FD = data.draw(rounds(lambda f: 2 * f + 1))
    f = len(evil_FD)
    mixed_CD = NNM(torch.cat([honest_HD, evil_FD]), NnmConfig(f=f))
    found_D = merged("median", {}, mixed_CD)
    mean_D = honest_HD.mean(dim=0)
    spread = float((honest_HD - mean_D).square().sum(dim=1).mean())
    count = len(mixed_CD)
    kappa = 8 * f / (count - f) * (4 * (1 + f / (count - 2 * f)) ** 2 + 1)
    assert float((found_D - mean_D).square().sum()) <= kappa * spread * (1 + 1e-4)
    clipped_CD = ARC(torch.cat([honest_HD, evil_FD]), ArcConfig(f=f))
    largest = float(honest_HD.norm(dim=1).max())
    assert float(clipped_CD.norm(dim=1).max()) <= largest * (1 + 1e-5)


@pytest.mark.parametrize("attack", ["huge", "far and alike"])
def test_a_mean_keeps_no_such_promise(attack: str) -> None:
    """So what is asked above can fail."""
    generator = torch.Generator().manual_seed(0)
    honest_HD = torch.randn(9, 20, generator=generator)
    found_D = merged("mean", {}, torch.cat([honest_HD, ATTACKS[attack](honest_HD, 1, generator)]))
    mean_D = honest_HD.mean(dim=0)
    spread = float((honest_HD - mean_D).square().sum(dim=1).mean())
    assert float((found_D - mean_D).square().sum()) > 6 * (1 + 1 / 8) ** 2 * spread


def test_two_in_different_directions_pass_dnc_and_not_after_clipping() -> None:
    """Its single direction drops one of them. What is said of it in its docstring."""
    generator = torch.Generator().manual_seed(0)
    honest_HD = 1 + 0.1 * torch.randn(7, 50, generator=generator)
    # The first draws the direction to itself, the second leans its way, and stays.
    evil_FD = torch.zeros(2, 50)
    evil_FD[0, 0], evil_FD[1, 0], evil_FD[1, 1] = 1e6, 1e3, 1e4
    deltas_CD = torch.cat([honest_HD, evil_FD])
    config = {"f": 2, "iterations": 1}
    assert float(merged("dnc", config, deltas_CD).norm()) > 1000
    norms_C = deltas_CD.norm(dim=1, keepdim=True)
    clipped_CD = deltas_CD * (norms_C.median() / norms_C).clamp(max=1)
    moved = merged("dnc", config, clipped_CD) - honest_HD.mean(dim=0)
    assert float(moved.norm()) < 2 * float(honest_HD.norm(dim=1).max())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 1000))
def test_copies_count_once_however_many(honest: int, copies: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    everyone = torch.randn(honest + 1, 80, generator=generator)
    copied = torch.cat([everyone, everyone[-1:].repeat(copies, 1)])
    torch.testing.assert_close(DEDUP(copied), everyone, atol=1e-5, rtol=1e-5)

"""Robust rules against loops over D-dimensional vectors."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from anabranch.aggregation.methods.caf import CAF, CafConfig
from anabranch.aggregation.methods.centred_clipping import CENTRED_CLIPPING, CentredClippingConfig
from anabranch.aggregation.methods.mda import MDA, MdaConfig
from anabranch.aggregation.methods.meamed import MEAMED, MeamedConfig
from anabranch.aggregation.methods.smea import SMEA, SmeaConfig
from anabranch.aggregation.robust.subsets import MOST_SUBSETS


def cohort(count: int = 8, seed: int = 0) -> Tensor:
    """Honest contributions around one direction, and one far away."""
    generator = torch.Generator().manual_seed(seed)
    deltas_CD = torch.randn(60, generator=generator) + 0.5 * torch.randn(
        count, 60, generator=generator
    )
    deltas_CD[2] = 5 * torch.randn(60, generator=generator)
    return deltas_CD


@pytest.mark.parametrize("f", [0, 1, 3])
def test_meamed_is_the_mean_of_the_values_nearest_to_the_median(f: int) -> None:
    deltas_CD = cohort(7)
    for entry, values in enumerate(deltas_CD.T.double()):
        middle = values.sort().values[3]
        nearest = sorted(values.tolist(), key=lambda value: abs(value - middle))[: 7 - f]
        wanted = sum(nearest) / len(nearest)
        found = float(MEAMED(deltas_CD, config=MeamedConfig(f=f))[entry])
        assert found == pytest.approx(wanted, abs=1e-5)


def best(deltas_CD: Tensor, f: int, score: str) -> Tensor:
    """The mean of the best subset, scored on the vectors themselves."""
    scores = {}
    for subset in combinations(range(len(deltas_CD)), len(deltas_CD) - f):
        mine = deltas_CD[list(subset)].double()
        if score == "diameter":
            scores[subset] = float(torch.cdist(mine, mine).max())
        else:
            spread = mine - mine.mean(dim=0)
            scores[subset] = float(torch.linalg.matrix_norm(spread, 2))
    chosen = min(scores, key=lambda subset: scores[subset])
    return deltas_CD[list(chosen)].mean(dim=0)


@pytest.mark.parametrize("f", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_rules_over_subsets_find_the_best_one(f: int, seed: int) -> None:
    deltas_CD = cohort(seed=seed)
    found = MDA(deltas_CD, config=MdaConfig(f=f))
    torch.testing.assert_close(found, best(deltas_CD, f, "diameter"), atol=1e-5, rtol=1e-5)
    found = SMEA(deltas_CD, config=SmeaConfig(f=f))
    torch.testing.assert_close(found, best(deltas_CD, f, "spread"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 6.0, 1e6])
def test_centred_clipping_is_its_own_loop(tau: float) -> None:
    deltas_CD = cohort()
    centre_D = torch.zeros(60)
    for _ in range(4):
        away_CD = deltas_CD - centre_D
        factors_C = (tau / away_CD.norm(dim=1)).clamp(max=1)
        centre_D = centre_D + (factors_C[:, None] * away_CD).mean(dim=0)
    config = CentredClippingConfig(tau=tau, steps=4)
    found = CENTRED_CLIPPING(deltas_CD, config=config)
    torch.testing.assert_close(found, centre_D, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("f", [1, 3])
def test_caf_is_its_own_loop(f: int) -> None:
    deltas_CD = cohort().double()
    count = len(deltas_CD)
    left_C, least, wanted_D = torch.ones(count).double(), torch.inf, deltas_CD[0]
    while left_C.sum() > count - 2 * f:
        mean_D = (left_C[:, None] * deltas_CD).sum(dim=0) / left_C.sum()
        away_CD = deltas_CD - mean_D
        covariance_DD = (left_C[:, None] * away_CD).T @ away_CD / left_C.sum()
        values, vectors = torch.linalg.eigh(covariance_DD)
        if float(values[-1]) < least:
            least, wanted_D = float(values[-1]), mean_D
        along_C = (away_CD @ vectors[:, -1]).square()
        along_C[left_C == 0] = 0
        left_C = left_C * (1 - along_C / along_C.max())
    found = CAF(deltas_CD.float(), config=CafConfig(f=f))
    torch.testing.assert_close(found, wanted_D.float(), atol=1e-4, rtol=1e-4)


def test_caf_of_nobody_malicious_is_the_mean() -> None:
    deltas_CD = cohort()
    torch.testing.assert_close(CAF(deltas_CD, config=CafConfig(f=0)), deltas_CD.mean(dim=0))


RULES = [
    (MEAMED, MeamedConfig), (MDA, MdaConfig), (SMEA, SmeaConfig), (CAF, CafConfig),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "config"), RULES, ids=lambda one: getattr(one, "name", ""))
@pytest.mark.parametrize("factor", [10.0, 1e6])
def test_a_minority_moves_no_rule_far(rule: object, config: type, factor: float) -> None:
    generator = torch.Generator().manual_seed(5)
    honest_CD = 1 + 0.1 * torch.randn(7, 200, generator=generator)
    evil_CD = factor * torch.randn(2, 200, generator=generator)
    everyone = torch.cat([honest_CD[:2], evil_CD, honest_CD[2:]])
    moved = rule(everyone, config=config(f=2)) - honest_CD.mean(dim=0)  # type: ignore[operator]
    spread = float((honest_CD - honest_CD.mean(dim=0)).norm(dim=1).max())
    assert float(moved.norm()) < 2 * spread


@pytest.mark.parametrize(("rule", "config"), RULES, ids=lambda one: getattr(one, "name", ""))
def test_no_minority_is_refused(rule: object, config: type) -> None:
    with pytest.raises(ValueError, match="4 malicious of 8 are no minority"):
        rule(cohort(), config=config(f=4))  # type: ignore[operator]


def test_too_many_subsets_are_refused() -> None:
    with pytest.raises(ValueError, match=f"more than {MOST_SUBSETS:,}"):
        MDA(torch.zeros(30, 4), config=MdaConfig(f=12))

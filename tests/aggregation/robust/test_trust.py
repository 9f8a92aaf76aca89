"""Bulyan, DnC, FLAME, FoolsGold, FLTrust, CRFL and dedup against loops over whole vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge, merge_task_vectors
from anabranch.aggregation.methods.bulyan import BULYAN, BulyanConfig
from anabranch.aggregation.methods.crfl import CRFL, CrflConfig
from anabranch.aggregation.methods.dnc import DNC, DncConfig, dnc_coefficients
from anabranch.aggregation.methods.flame import FLAME, admitted
from anabranch.aggregation.methods.fltrust import FLTRUST, FlTrustConfig
from anabranch.aggregation.methods.foolsgold import FOOLSGOLD, FoolsGoldConfig
from anabranch.aggregation.robust import DEDUP
from anabranch.aggregation.robust.dedup import DedupConfig
from anabranch.aggregation.sample import positions
from anabranch.vectors import LowRank, TaskVector


def cohort(count: int = 11, seed: int = 0, entries: int = 60) -> Tensor:
    """Honest contributions around one direction, and two far away."""
    generator = torch.Generator().manual_seed(seed)
    deltas_CD = torch.randn(entries, generator=generator) + 0.5 * torch.randn(
        count, entries, generator=generator
    )
    deltas_CD[2] *= -4
    deltas_CD[5] = 5 * torch.randn(entries, generator=generator)
    return deltas_CD


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)


def cosine(one_D: Tensor, other_D: Tensor) -> float:
    return float(one_D @ other_D / one_D.norm() / other_D.norm())


@pytest.mark.parametrize("f", [0, 1, 2])
def test_bulyan_is_its_own_loop(f: int) -> None:
    deltas_CD = cohort()
    count = len(deltas_CD)
    scores = []
    for mine in deltas_CD.double():
        distances = sorted(float((mine - other).square().sum()) for other in deltas_CD.double())
        scores.append(sum(distances[1 : count - f - 1]))
    chosen = sorted(range(count), key=lambda place: scores[place])[: count - 2 * f]
    wanted = []
    for values in deltas_CD[sorted(chosen)].T.double():
        middle = float(torch.quantile(values, 0.5))
        nearest = sorted(values.tolist(), key=lambda value: abs(value - middle))
        wanted.append(sum(nearest[: count - 4 * f]) / (count - 4 * f))
    near(BULYAN(deltas_CD, config=BulyanConfig(f=f)), torch.tensor(wanted))


def test_bulyan_takes_enough() -> None:
    with pytest.raises(ValueError, match=r"f: 2 malicious need at least 11 .*, there are 10"):
        BULYAN(cohort(10), config=BulyanConfig(f=2))


@pytest.mark.parametrize(("f", "iterations"), [(0, 1), (1, 1), (2, 3), (4, 2)])
def test_dnc_is_its_own_loop(f: int, iterations: int) -> None:
    deltas_CD = cohort().double()
    good = set(range(11))
    for part in range(iterations):
        mine = deltas_CD[:, part::iterations]
        away = mine - mine.mean(dim=0)
        direction = torch.linalg.svd(away, full_matrices=False).Vh[0]
        scores = (away @ direction).square()
        good &= set(scores.argsort()[: 11 - f].tolist())
    assert good
    found = DNC(deltas_CD.float(), config=DncConfig(f=f, iterations=iterations))
    near(found, deltas_CD[sorted(good)].mean(dim=0))


def test_dnc_merges_somebody_where_each_is_dropped_once() -> None:
    deltas_CD = torch.eye(5).repeat(1, 4)
    config = DncConfig(f=2, iterations=4, filter=2.0)
    assert bool(DNC(deltas_CD, config=config).isfinite().all())
    with pytest.raises(ValueError, match="3 malicious of 5 are no minority"):
        DNC(deltas_CD, config=DncConfig(f=3))


@pytest.mark.parametrize("form", ["factors", "dense", "both"])
@pytest.mark.parametrize("budget_bytes", [1 << 28, 330_000])
def test_a_sample_holds_the_entries_it_names(form: str, budget_bytes: int) -> None:
    """DnC on a sample is DnC on these entries alone, however the modules are held."""
    generator = torch.Generator().manual_seed(4)
    parts = [
        (torch.randn(90, 2, generator=generator), torch.randn(2, 30, generator=generator))
        for _ in range(7)
    ]
    parts[3] = (-9 * parts[3][0], parts[3][1])
    dense = [b @ a for b, a in parts]
    biases = torch.randn(7, 50, generator=generator)
    vectors = []
    for place, ((b, a), whole) in enumerate(zip(parts, dense, strict=True)):
        factors = form == "factors" or (form == "both" and place % 2)
        matrix = LowRank(b, a) if factors else whole
        vectors.append(TaskVector({"w": matrix, "bias": biases[place]}))
    config = {"f": 2, "size": 300, "iterations": 2, "seed": 5}
    recipe = Recipe(method="dnc", params=config)
    found = merge_task_vectors(vectors, recipe, budget_bytes=budget_bytes).deltas["w"]
    drawn = positions({"bias": 50, "w": 2700}, 600, DncConfig(**config))
    assert len(drawn["bias"]) <= 11 < 400 < len(drawn["w"]) <= 590
    flat_CD = torch.stack([whole.flatten() for whole in dense])
    sample_CS = torch.cat([biases[:, drawn["bias"]], flat_CD[:, drawn["w"]]], dim=1)
    chosen = dnc_coefficients(torch.ones(7), None, DncConfig(**config), sample_CS=sample_CS)
    whole = found.dense() if isinstance(found, LowRank) else torch.as_tensor(found)
    torch.testing.assert_close(whole.flatten(), chosen.float() @ flat_CD, atol=1e-4, rtol=1e-4)
    assert chosen[3] == 0


@pytest.mark.parametrize("seed", range(4))
def test_flame_is_its_own_loop(seed: int) -> None:
    deltas_CD = cohort(seed=seed).double()
    count = len(deltas_CD)
    clusters = [{place} for place in range(count)]
    pairs = sorted(
        (1 - cosine(deltas_CD[i], deltas_CD[j]), i, j) for i in range(count) for j in range(i)
    )
    for _, i, j in pairs:
        one = next(cluster for cluster in clusters if i in cluster)
        other = next(cluster for cluster in clusters if j in cluster)
        if one is not other:
            clusters.remove(other)
            one |= other
        if len(one) > count // 2:
            break
    norms = deltas_CD.norm(dim=1)
    middle = float(norms.sort().values[(count - 1) // 2])
    clipped = [deltas_CD[i] * min(1.0, middle / float(norms[i])) for i in sorted(one)]
    near(FLAME(deltas_CD.float()), torch.stack(clipped).mean(dim=0))
    assert not one & {2, 5}


def test_flame_admits_the_majority_whatever_the_others_agree_on() -> None:
    generator = torch.Generator().manual_seed(1)
    honest = torch.randn(300, generator=generator) + torch.randn(6, 300, generator=generator)
    alike = torch.randn(300, generator=generator).expand(5, -1)
    everyone = torch.cat([alike, honest]).double()
    assert admitted(everyone @ everyone.T) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_noise_is_of_the_size_asked_for_and_by_seed(count: int) -> None:
    deltas_CD = cohort(7, entries=40_000)
    recipes = [
        {"method": "flame", "params": {"noise": 0.001, "seed": 3}},
        {"method": "crfl", "params": {"sigma": 0.3, "seed": 3}},
    ]
    parts = [[d.view(count, -1, 10)[p] for p in range(count)] for d in deltas_CD]
    vectors = [TaskVector({f"m{i}": p for i, p in enumerate(one)}) for one in parts]
    for given, method in zip(recipes, (FLAME, CRFL), strict=True):
        recipe = Recipe.model_validate(given)
        found = flat(merge_task_vectors(vectors, recipe, budget_bytes=1 << 22))
        assert torch.equal(found, flat(merge_task_vectors(vectors, recipe)))
        other = {**given, "params": {**given["params"], "seed": 4}}  # type: ignore[dict-item]
        assert not torch.equal(
            found, flat(merge_task_vectors(vectors, Recipe.model_validate(other)))
        )
        quiet = {"noise": 0.0} if method is FLAME else {"sigma": 0.0}
        noise_D = found - method(deltas_CD, config=method.config(**quiet))
        norms = deltas_CD.norm(dim=1).median()
        wanted = 0.3 if method is CRFL else 0.001 * float(norms)
        assert float(noise_D.std()) == pytest.approx(wanted, rel=0.02)
        assert abs(float(noise_D.mean())) < 5 * wanted / math.sqrt(len(noise_D))
        # As many beyond one and two deviations as a normal distribution has.
        for times, share in ((1, 0.3173), (2, 0.0455)):
            beyond = float((noise_D.abs() > times * wanted).double().mean())
            assert beyond == pytest.approx(share, abs=0.01)


def flat(vector: TaskVector) -> Tensor:
    return torch.cat([torch.as_tensor(vector.deltas[n]).flatten() for n in sorted(vector.deltas)])


def test_only_noise_makes_entries_of_factors(make_adapter: Any) -> None:
    adapters = [make_adapter(seed) for seed in range(5)]
    stacked = {"kind": "stack"}
    for method, params in (("flame", {}), ("crfl", {"sigma": 0})):
        recipe = Recipe.model_validate({"method": method, "params": params, "refactor": stacked})
        assert merge(adapters, recipe).report.coefficients is not None
    recipe = Recipe.model_validate(
        {"method": "flame", "params": {"noise": 0.1}, "refactor": stacked}
    )
    with pytest.raises(ValueError, match="flame gives no such sum; set it to svd"):
        merge(adapters, recipe)
    noisy = Recipe(method="crfl", params={"sigma": 0.1})
    assert merge(adapters, noisy).report.overall_truncation > 0


@pytest.mark.parametrize("norm", [None, 0.5, 1e6])
def test_crfl_is_the_mean_clipped(norm: float | None) -> None:
    deltas_CD = cohort(6)
    weights = torch.tensor([1.0, 2, 3, 1, 1, 2])
    mean_D = (weights[:, None] * deltas_CD).sum(dim=0) / weights.sum()
    most = float(deltas_CD.norm(dim=1).sort().values[2]) if norm is None else norm
    wanted = mean_D * min(1.0, most / float(mean_D.norm()))
    near(CRFL(deltas_CD, weights, CrflConfig(norm=norm, sigma=0.0)), wanted)


def test_foolsgold_is_the_authors_loop() -> None:
    deltas_CD = cohort(8).double()
    deltas_CD[6] = deltas_CD[3] + 0.1
    deltas_CD[7] = 0.5 * deltas_CD[3]
    for kappa in (1.0, 0.3):
        found = FOOLSGOLD(deltas_CD.float(), config=FoolsGoldConfig(confidence=kappa))
        weights = _foolsgold(deltas_CD, kappa)
        near(found, weights @ deltas_CD / weights.sum())
    assert not weights[[3, 6, 7]].any()


def _foolsgold(deltas_CD: Tensor, kappa: float) -> Tensor:
    count = len(deltas_CD)
    alike = [
        [0.0 if i == j else cosine(deltas_CD[i], deltas_CD[j]) for j in range(count)]
        for i in range(count)
    ]
    most = [max(row) for row in alike]
    for i in range(count):
        for j in range(count):
            if i != j and most[i] < most[j]:
                alike[i][j] *= most[i] / most[j]
    trust = torch.tensor([1 - max(row) for row in alike]).double().clamp(0, 1)
    trust = trust / trust.max()
    trust[trust == 1] = 0.99
    trust = kappa * ((trust / (1 - trust)).log() + 0.5)
    return trust.clamp(0, 1)


def test_foolsgold_by_a_history_sees_sybils_that_take_turns() -> None:
    """In each round they differ; their sums do not."""
    generator = torch.Generator().manual_seed(2)
    sums_CD = torch.randn(5, 400, generator=generator)
    sums_CD[4] = sums_CD[3] + 0.01 * torch.randn(400, generator=generator)
    deltas_CD = torch.randn(5, 400, generator=generator)
    rows = [[cosine(one, other) for other in sums_CD] for one in sums_CD]
    exact = tuple(
        tuple(1.0 if i == j else rows[min(i, j)][max(i, j)] for j in range(5)) for i in range(5)
    )
    recipe = Recipe(method="foolsgold", params={"history": exact})
    found = merge_task_vectors([TaskVector({"m": d}) for d in deltas_CD], recipe).deltas["m"]
    near(torch.as_tensor(found), deltas_CD[:3].mean(dim=0))
    with pytest.raises(ValueError, match="history: is of 5 contributions, there are 4"):
        FOOLSGOLD(deltas_CD[:4], config=FoolsGoldConfig(history=exact))
    wrong = ((1.0, 0.3), (0.2, 1.0))
    with pytest.raises(ValueError, match="holds what are no cosines"):
        FOOLSGOLD(deltas_CD[:2], config=FoolsGoldConfig(history=wrong))


def test_fltrust_is_its_own_loop() -> None:
    deltas_CD = cohort(7)
    names = ["site/a", "site/b", "c", "d", "trusted/root", "f", "g"]
    root_D, total_D, trust = deltas_CD[4], torch.zeros(60), 0.0
    for place, mine_D in enumerate(deltas_CD):
        if place != 4:
            weight = max(0.0, cosine(mine_D, root_D))
            total_D += weight * mine_D * root_D.norm() / mine_D.norm()
            trust += weight
    near(FLTRUST(deltas_CD, names=names), total_D / trust)
    recipe = Recipe(method="fltrust", params={"root": "trusted/root"})
    vectors = [TaskVector({"m": mine_D}) for mine_D in deltas_CD]
    found = merge_task_vectors(vectors, recipe, names=names).deltas["m"]
    near(torch.as_tensor(found), total_D / trust)
    # Whoever is left out does not move the root to another.
    rest = merge_task_vectors(vectors, recipe, names=names, without=["c"]).deltas["m"]
    others = [0, 1, 3, 4, 5, 6]
    near(
        torch.as_tensor(rest),
        FLTRUST(deltas_CD[others], names=[names[place] for place in others]),
    )


def test_fltrust_needs_its_root_and_changes_nothing_without_a_friend() -> None:
    deltas_CD = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    config = FlTrustConfig(root="contribution 0")
    assert FLTRUST(deltas_CD, config=config).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"fltrust: root: 'root' is none of contribution 0, c"):
        FLTRUST(deltas_CD)
    with pytest.raises(ValueError, match="is the only contribution"):
        FLTRUST(deltas_CD[:1], config=config)
    recipe = Recipe.model_validate(
        {"method": "fltrust", "params": {"root": "contribution 0"}, "pre": [{"name": "clip"}]}
    )
    with pytest.raises(ValueError, match="pre: fltrust singles out a contribution by name"):
        merge_task_vectors([TaskVector({"m": d}) for d in deltas_CD], recipe)


def test_dedup_counts_sybils_once() -> None:
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(3, 200, generator=generator)
    sybil = torch.randn(200, generator=generator)
    jitter = 0.01 * torch.randn(4, 200, generator=generator)
    # One is a copy at another length, two send nothing.
    sybils = torch.stack([sybil, sybil, 7 * sybil, sybil]) + jitter
    everyone = torch.cat([honest[:1], sybils, honest[1:], torch.zeros(2, 200)])
    found = DEDUP(everyone)
    near(found, torch.cat([honest[:1], sybils.mean(0, keepdim=True), honest[1:], 0 * honest[:1]]))
    strict = DEDUP(everyone, DedupConfig(cosine=1.0, distance=0.0))
    near(strict, everyone[:-1])
    recipe = Recipe.model_validate({"method": "mean", "pre": [{"name": "dedup"}]})
    merged = merge_task_vectors([TaskVector({"m": one}) for one in everyone], recipe).deltas["m"]
    near(torch.as_tensor(merged), found.mean(dim=0))


def test_dedup_follows_a_chain_of_copies() -> None:
    turns = torch.arange(6) * 0.1
    chain = torch.stack([turns.cos(), turns.sin()], dim=1)
    assert len(DEDUP(chain)) == 1
    assert len(DEDUP(chain[::2])) == 3

"""ByzFL 0.0.11 beside us, rule by rule: equal to 1e-5, and where we differ, how."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.aggregation.robust import ARC, BUCKETING, CLIP, NNM
from anabranch.aggregation.robust.arc import ArcConfig
from anabranch.aggregation.robust.bucketing import BucketingConfig
from anabranch.aggregation.robust.clip import ClipConfig
from anabranch.aggregation.robust.nnm import NnmConfig
from anabranch.vectors import TaskVector


@pytest.fixture(scope="module")
def byzfl() -> Iterator[Any]:
    """Its rules alone: the package's own start imports data sets and models."""
    spec = importlib.util.find_spec("byzfl")
    assert spec is not None, "byzfl is not installed; run `make install`"
    assert spec.submodule_search_locations is not None
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec  # found again by who asks for it
    before = sys.modules.get("byzfl")
    sys.modules["byzfl"] = package
    yield importlib.import_module("byzfl.aggregators")
    for name in [name for name in sys.modules if name.split(".")[0] == "byzfl"]:
        del sys.modules[name]
    if before is not None:
        sys.modules["byzfl"] = before


def cohort(count: int = 11, entries: int = 500) -> Tensor:
    """Honest contributions around one direction, and two far away."""
    generator = torch.Generator().manual_seed(count)
    deltas_CD = torch.randn(entries, generator=generator) + 0.5 * torch.randn(
        count, entries, generator=generator
    )
    deltas_CD[1] *= -6
    deltas_CD[4] = 8 * torch.randn(entries, generator=generator)
    return deltas_CD


def merged(
    deltas_CD: Tensor, method: str, pre: tuple[dict[str, Any], ...] = (), **params: Any
) -> Tensor:
    """Through the engine, in two modules."""
    recipe = Recipe.model_validate({"method": method, "params": params, "pre": pre})
    cut = [(delta_D[:200].view(20, 10), delta_D[200:]) for delta_D in deltas_CD]
    vectors = [TaskVector({"m": first, "n": second}) for first, second in cut]
    total = merge_task_vectors(vectors, recipe).deltas
    parts = (total["m"], total["n"])
    return torch.cat([part.flatten() for part in parts if isinstance(part, Tensor)])


def test_coordinate_wise_rules(byzfl: Any) -> None:
    deltas_CD = cohort()
    torch.testing.assert_close(merged(deltas_CD, "median"), byzfl.Median()(deltas_CD.clone()))
    for f in (1, 3, 5):
        ours = merged(deltas_CD, "trimmed_mean", trim=f)
        theirs = byzfl.TrMean(f)(deltas_CD.clone())
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_geometric_median_where_theirs_has_converged(byzfl: Any) -> None:
    """Three steps from zero, their default, are far from it."""
    deltas_CD = cohort(entries=300)
    ours = merged(deltas_CD, "geometric_median", nu=1e-9)
    theirs = byzfl.GeometricMedian(nu=1e-9, T=2000)(deltas_CD.double())
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, byzfl.GeometricMedian()(deltas_CD.clone()), rtol=1e-3)


def test_krum_takes_one_neighbour_less(byzfl: Any) -> None:
    """The paper's C − f − 2, as Flower; ByzFL takes C − f − 1."""
    for seed in range(20):
        deltas_CD = torch.randn(7, 300, generator=torch.Generator().manual_seed(seed))
        for f in (1, 2):
            ours = merged(deltas_CD, "multi_krum", f=f, m=1)
            distances_CC = torch.cdist(deltas_CD.double(), deltas_CD.double()).square()
            ordered_CC = distances_CC.sort(dim=1).values[:, 1:]
            papers = ordered_CC[:, : 7 - f - 2].sum(dim=1).argmin()
            theirs = ordered_CC[:, : 7 - f - 1].sum(dim=1).argmin()
            assert torch.allclose(ours, deltas_CD[papers], atol=1e-6)
            assert torch.allclose(byzfl.Krum(f)(deltas_CD.clone()), deltas_CD[theirs], atol=1e-6)


@pytest.mark.parametrize("f", [1, 2, 4])
def test_nnm(byzfl: Any, f: int) -> None:
    deltas_CD = cohort()
    torch.testing.assert_close(
        NNM(deltas_CD, NnmConfig(f=f)), byzfl.NNM(f)(deltas_CD.clone()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("f", [0, 1, 2, 5])
def test_arc(byzfl: Any, f: int) -> None:
    deltas_CD = cohort()
    before = deltas_CD.clone()
    ours = ARC(deltas_CD, ArcConfig(f=f))
    torch.testing.assert_close(ours, byzfl.ARC(f)(deltas_CD), atol=1e-5, rtol=1e-5)
    # Theirs changes what it is given; ours never does.
    ARC(before, ArcConfig(f=f))
    assert torch.equal(before, cohort())
    assert f == 0 or not torch.equal(deltas_CD, before)


@pytest.mark.parametrize("norm", [1.0, 20.0, 1e6])
def test_clipping(byzfl: Any, norm: float) -> None:
    deltas_CD = cohort()
    ours = CLIP(deltas_CD, ClipConfig(norm=norm))
    torch.testing.assert_close(ours, byzfl.Clipping(norm)(deltas_CD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 11, 20])
def test_bucketing_up_to_its_own_order(byzfl: Any, size: int) -> None:
    deltas_CD = cohort()
    np.random.seed(0)
    theirs_KD = torch.as_tensor(byzfl.Bucketing(size)(deltas_CD))
    ours_KD = BUCKETING(deltas_CD, BucketingConfig(size=size))
    assert ours_KD.shape == theirs_KD.shape
    # The orders are drawn differently; sizes of the buckets, and their weighted mean, are not.
    sizes = torch.full((len(ours_KD), 1), float(size))
    sizes[-1] = 11 - size * (len(ours_KD) - 1)
    for means_KD in (ours_KD, theirs_KD):
        torch.testing.assert_close(
            (means_KD * sizes).sum(dim=0) / 11, deltas_CD.mean(dim=0), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("method", ["median", "trimmed_mean", "geometric_median"])
def test_steps_before_a_method(byzfl: Any, method: str) -> None:
    deltas_CD = cohort()
    theirs = {
        "median": byzfl.Median(),
        "trimmed_mean": byzfl.TrMean(1),
        "geometric_median": byzfl.GeometricMedian(nu=1e-9, T=2000),
    }[method]
    pre = ({"name": "arc", "params": {"f": 2}}, {"name": "nnm", "params": {"f": 2}})
    ours = merged(deltas_CD, method, pre).double()
    mixed = byzfl.NNM(2)(byzfl.ARC(2)(deltas_CD.double()))
    torch.testing.assert_close(ours, theirs(mixed).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("f", [1, 2, 4])
def test_meamed_and_mda(byzfl: Any, f: int) -> None:
    deltas_CD = cohort(entries=300)
    ours = merged(deltas_CD, "meamed", f=f)
    torch.testing.assert_close(ours, byzfl.Meamed(f)(deltas_CD.clone()), atol=1e-5, rtol=1e-5)
    ours = merged(deltas_CD, "mda", f=f)
    torch.testing.assert_close(ours, byzfl.MDA(f)(deltas_CD.clone()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 30.0])
def test_centred_clipping(byzfl: Any, tau: float) -> None:
    deltas_CD = cohort()
    ours = merged(deltas_CD, "centred_clipping", tau=tau, steps=3)
    theirs = byzfl.CenteredClipping(L=3, tau=tau)(deltas_CD.clone())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_filters_where_theirs_guesses_the_direction(byzfl: Any) -> None:
    """One step from a random vector: the same where one outlier rules the spread."""
    deltas_CD = cohort(entries=300)
    deltas_CD[1] = deltas_CD[0] + 0.1
    deltas_CD[4] *= 50
    torch.manual_seed(0)
    ours = merged(deltas_CD, "smea", f=1)
    torch.testing.assert_close(ours, byzfl.SMEA(1)(deltas_CD.clone()), atol=1e-5, rtol=1e-5)

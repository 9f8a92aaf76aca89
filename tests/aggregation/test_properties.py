"""What holds for every method, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation.method import MethodConfig
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.breadcrumbs import BreadcrumbsConfig
from anabranch.aggregation.methods.bulyan import BulyanConfig
from anabranch.aggregation.methods.consensus import ConsensusConfig
from anabranch.aggregation.methods.crfl import CrflConfig
from anabranch.aggregation.methods.dare_linear import DareConfig
from anabranch.aggregation.methods.della_linear import DellaConfig
from anabranch.aggregation.methods.dnc import DncConfig
from anabranch.aggregation.methods.fltrust import FlTrustConfig
from anabranch.aggregation.methods.geometric_median import GeometricMedianConfig
from anabranch.aggregation.methods.multi_krum import MultiKrumConfig
from anabranch.aggregation.methods.rank_vote import RankVoteConfig
from anabranch.aggregation.methods.robust_ties import RobustTiesConfig
from anabranch.aggregation.methods.ties import TiesConfig

# Those that see a matrix as one are in test_spectral_properties.py.
BY_NAME = {method.name: method for method in BUILT_IN if method.matrices is None}

KEEP_ALL = {
    "breadcrumbs": BreadcrumbsConfig(density=1.0),
    "crfl": CrflConfig(sigma=0.0),
    "breadcrumbs_ties": BreadcrumbsConfig(density=1.0),
    "consensus": ConsensusConfig(mask_scale=0.0),
    "dare_linear": DareConfig(density=1.0),
    "dare_ties": DareConfig(density=1.0),
    "della": DellaConfig(density=1.0, epsilon=0.0),
    "della_linear": DellaConfig(density=1.0, epsilon=0.0),
    "ties": TiesConfig(density=1.0),
    "rank_vote": RankVoteConfig(density=1.0),
    "robust_ties": RobustTiesConfig(density=1.0),
}

NEEDS: dict[str, MethodConfig] = {
    "bulyan": BulyanConfig(f=0),
    "fltrust": FlTrustConfig(root="contribution 0"),
    "multi_krum": MultiKrumConfig(f=0),
}

ORDERED = {
    "flame": "of equal clusters the earlier one is merged",
    "fltrust": "goes by names, which the order gives",
    "dare_linear": "masks are drawn by position",
    "dare_ties": "masks are drawn by position",
    "della": "masks are drawn by position",
    "della_linear": "masks are drawn by position",
    "karcher": "starts at the first where unit vectors cancel",
    "caf": "equal eigenvalues leave the direction open",
    "mda": "equal scores go to the earlier one",
    "bulyan": "equal scores go to the earlier one",
    "dnc": "equal scores go to the earlier one",
    "multi_krum": "equal scores go to the earlier one",
    "smea": "equal scores go to the earlier one",
    "pcb": "rounding decides between equal scores",
    "slerp": "goes from the first to the second",
}


def merged(
    name: str, deltas_CD: Tensor, weights_C: Tensor, config: MethodConfig | None = None
) -> Tensor:
    """The method at its defaults, and at the size it can take."""
    if name in NEEDS:
        config = config or NEEDS[name]
    if name == "slerp":
        deltas_CD, weights_C = deltas_CD[:2], weights_C[:2]
    return BY_NAME[name](deltas_CD, weights_C, config)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    count = draw(st.integers(3, 7))
    entries = draw(st.integers(1, 40))
    # Coarse numbers, so that ties, zeros and equal rows do come up.
    value = st.integers(-8, 8).map(lambda number: number / 4)
    rows = draw(
        st.lists(
            st.lists(value, min_size=entries, max_size=entries), min_size=count, max_size=count
        )
    )
    weights = draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    return torch.tensor(rows), torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(BY_NAME))
@settings(max_examples=12, deadline=None)
@given(cohort=cohorts(), exponent=st.sampled_from([-30, 0, 30]))
def test_finite_in_finite_out_and_inputs_untouched(
    name: str, cohort: tuple[Tensor, Tensor], exponent: int
) -> None:
    """Of any unit: squares of some of these are neither zero nor finite in fp32."""
    deltas_CD, weights_C = cohort
    deltas_CD = deltas_CD * 10.0**exponent
    before_CD = deltas_CD.clone()
    merged_D = merged(name, deltas_CD, weights_C)
    assert bool(merged_D.isfinite().all())
    assert torch.equal(deltas_CD, before_CD)


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - ORDERED.keys()))
@settings(max_examples=12, deadline=None)
@given(cohort=cohorts(), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(
    name: str, cohort: tuple[Tensor, Tensor], shuffle: object
) -> None:
    deltas_CD, weights_C = cohort
    order = list(range(len(deltas_CD)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    again_D = merged(name, deltas_CD[order], weights_C[order])
    torch.testing.assert_close(again_D, merged(name, deltas_CD, weights_C), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("multi_krum", MultiKrumConfig(f=2, m=4)),
        ("karcher", None),
        ("pcb", None),
        ("flame", None),
        ("bulyan", BulyanConfig(f=1)),
        ("dnc", DncConfig(f=2)),
    ],
)
def test_the_order_of_clients_decides_between_equals_only(
    name: str, config: MethodConfig | None
) -> None:
    deltas_CD = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    method = BY_NAME[name]
    weights_C = torch.arange(1.0, 10.0)
    torch.testing.assert_close(
        method(deltas_CD[order], weights_C[order], config), method(deltas_CD, weights_C, config)
    )


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"pcb", "sign_vote"}))
@settings(max_examples=8, deadline=None)
@given(cohort=cohorts())
def test_equal_contributions_merge_to_themselves(name: str, cohort: tuple[Tensor, Tensor]) -> None:
    """With nothing trimmed; PCB-Merging lets a part compete only, a vote keeps signs only."""
    deltas_CD, weights_C = cohort
    same_CD = deltas_CD[:1].expand(len(deltas_CD), -1)
    if name in ("task_arithmetic", "consensus"):
        weights_C = weights_C / weights_C.sum()
    merged_D = merged(name, same_CD, weights_C, KEEP_ALL.get(name))
    torch.testing.assert_close(merged_D, same_CD[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"pcb"}))
@settings(max_examples=8, deadline=None)
@given(cohort=cohorts())
def test_merging_keeps_scale(name: str, cohort: tuple[Tensor, Tensor]) -> None:
    """ν and σ are in the unit of the norms, and scaled along. PCB-Merging has tanh."""
    deltas_CD, weights_C = cohort
    before = {"crfl": CrflConfig(sigma=0.25)}.get(name)
    scaled = {"crfl": CrflConfig(sigma=1.0), "geometric_median": GeometricMedianConfig(nu=4e-6)}
    merged_D = merged(name, deltas_CD, weights_C, before)
    again_D = merged(name, 4 * deltas_CD, weights_C, scaled.get(name))
    torch.testing.assert_close(again_D, 4 * merged_D)

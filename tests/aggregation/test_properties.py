"""What holds for every method, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.methods.dare_linear import DareConfig
from anabranch.aggregation.methods.multi_krum import MultiKrumConfig
from anabranch.aggregation.methods.ties import TiesConfig

# Those that see a matrix as one are in test_spectral_properties.py.
BY_NAME = {method.name: method for method in BUILT_IN if method.matrices is None}
DETERMINISTIC = sorted(name for name in BY_NAME if not name.startswith("dare"))


def config_for(method: MergeMethod) -> MethodConfig:
    if method.name == "multi_krum":
        return MultiKrumConfig(f=0)
    return method.config()


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
@given(cohort=cohorts())
def test_finite_in_finite_out_and_inputs_untouched(
    name: str, cohort: tuple[Tensor, Tensor]
) -> None:
    deltas_CD, weights_C = cohort
    before_CD = deltas_CD.clone()
    method = BY_NAME[name]
    merged_D = method(deltas_CD, weights_C, config_for(method))
    assert bool(merged_D.isfinite().all())
    assert torch.equal(deltas_CD, before_CD)


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "multi_krum"])
@settings(max_examples=12, deadline=None)
@given(cohort=cohorts(), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(
    name: str, cohort: tuple[Tensor, Tensor], shuffle: object
) -> None:
    deltas_CD, weights_C = cohort
    order = list(range(len(deltas_CD)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    method = BY_NAME[name]
    config = config_for(method)
    merged_D = method(deltas_CD, weights_C, config)
    again_D = method(deltas_CD[order], weights_C[order], config)
    torch.testing.assert_close(again_D, merged_D, atol=1e-5, rtol=1e-5)


def test_the_order_of_clients_does_not_matter_to_krum() -> None:
    """Apart from exact ties in the score, which go to the earlier one."""
    deltas_CD = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    method, config = BY_NAME["multi_krum"], MultiKrumConfig(f=2, m=4)
    torch.testing.assert_close(
        method(deltas_CD[order], None, config), method(deltas_CD, None, config)
    )


@pytest.mark.parametrize("name", sorted(BY_NAME))
@settings(max_examples=8, deadline=None)
@given(cohort=cohorts())
def test_equal_contributions_merge_to_themselves(name: str, cohort: tuple[Tensor, Tensor]) -> None:
    deltas_CD, weights_C = cohort
    same_CD = deltas_CD[:1].expand(len(deltas_CD), -1)
    method = BY_NAME[name]
    if name == "task_arithmetic":
        weights_C = weights_C / weights_C.sum()
    config: MethodConfig = config_for(method)
    if isinstance(config, TiesConfig | DareConfig):
        config = config.model_copy(update={"density": 1.0})
    merged_D = method(same_CD, weights_C, config)
    torch.testing.assert_close(merged_D, same_CD[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
@settings(max_examples=8, deadline=None)
@given(cohort=cohorts())
def test_merging_keeps_scale(name: str, cohort: tuple[Tensor, Tensor]) -> None:
    """Smoothing is in the unit of the norms, so ν is scaled along."""
    deltas_CD, weights_C = cohort
    method = BY_NAME[name]
    config = config_for(method)
    scaled_config = config
    if name == "geometric_median":
        scaled_config = config.model_copy(update={"nu": 4e-6})
    merged_D = method(deltas_CD, weights_C, config)
    torch.testing.assert_close(method(4 * deltas_CD, weights_C, scaled_config), 4 * merged_D)

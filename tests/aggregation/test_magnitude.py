from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.aggregation.magnitude import kept, stream_kth, tensor_kth


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 30).flatmap(
        lambda size: st.lists(
            st.lists(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                min_size=size,
                max_size=size,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    data=st.data(),
)
def test_the_kth_is_the_one_a_sort_finds(rows: list[list[float]], data: st.DataObject) -> None:
    deltas_CD = torch.tensor(rows)
    count = data.draw(st.integers(1, deltas_CD.shape[1]))
    cut = data.draw(st.integers(0, deltas_CD.shape[1]))
    chunks = [deltas_CD[:, :cut], deltas_CD[:, cut:]]
    for magnitude in (True, False):
        compared_CD = deltas_CD.abs() if magnitude else deltas_CD
        expected_C = compared_CD.sort(dim=1, descending=True).values[:, count - 1]
        assert torch.equal(stream_kth(chunks, count, magnitude), expected_C)
        assert torch.equal(tensor_kth(deltas_CD, count, magnitude), expected_C)


def test_keeping_what_reaches_the_threshold_keeps_the_count() -> None:
    deltas_CD = torch.randn(4, 10_007, generator=torch.Generator().manual_seed(0)).to(torch.float32)
    for density in (0.0001, 0.1, 0.2, 0.999, 1.0):
        count = kept(density, 10_007)
        thresholds_C = stream_kth([deltas_CD], count)
        assert torch.equal(tensor_kth(deltas_CD, count), thresholds_C)
        assert ((deltas_CD.abs() >= thresholds_C[:, None]).sum(1) == count).all()


def test_density_keeps_at_least_one() -> None:
    assert kept(0.2, 100) == 20
    assert kept(0.001, 100) == 1
    assert kept(1.0, 7) == 7


def test_a_count_beyond_the_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="5-th largest of 4 entries"):
        stream_kth([torch.ones(2, 4)], 5)
    with pytest.raises(ValueError, match="no entries"):
        stream_kth([], 1)

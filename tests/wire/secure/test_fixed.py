from __future__ import annotations

from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.wire.secure.fixed import FixedPoint

BITS = st.sampled_from([32, 64])
CLIPS = st.floats(1e-6, 1e6)


@given(BITS, CLIPS, st.integers(1, 1000), st.lists(st.floats(-2, 2), max_size=9))
@settings(max_examples=60, deadline=None)
def test_a_sum_is_that_of_the_rounded_vectors_and_never_wraps(
    bits: Literal[32, 64], clip: float, members: int, shares: list[float]
) -> None:
    fixed = FixedPoint(clip, bits, members)
    # As many as there is room for, all of them at the clip but a few.
    values = np.array([*shares, *[1.0] * members][:members]) * clip
    total = fixed.encode(values).sum(keepdims=True, dtype=fixed.dtype)
    step = fixed.step
    rounded = [round(Fraction(min(max(value, -clip), clip)) / step) for value in values.tolist()]
    naive = sum(rounded) * step
    assert abs(naive) < Fraction(2) ** (bits - 1) * step
    got = Fraction(float(fixed.decode(total, members)[0]))
    # fp64 holds a sum of 64 bits to 53 of them.
    assert abs(got - naive) <= abs(naive) / 2**53


@given(BITS, CLIPS, st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_the_step_is_the_smallest_that_fits(
    bits: Literal[32, 64], clip: float, members: int
) -> None:
    fixed = FixedPoint(clip, bits, members)
    most = Fraction(2) ** (bits - 1) - 1
    assert members * -(-Fraction(clip) // fixed.step) <= most
    assert members * -(-Fraction(clip) // (fixed.step / 2)) > most


@given(BITS, st.lists(st.floats(-3, 3), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_an_entry_is_off_by_half_a_step_at_most(bits: Literal[32, 64], values: list[float]) -> None:
    fixed = FixedPoint(3.0, bits, 10)
    got = fixed.decode(fixed.encode(np.array(values)), 1)
    assert (np.abs(got - values) <= float(fixed.step) / 2 + 1e-15).all()


def test_what_is_beyond_the_clip_is_cut_off_and_what_is_no_number_refused() -> None:
    fixed = FixedPoint(0.5, 32, 3)
    got = fixed.decode(fixed.encode(np.array([7.0, -7.0, 0.25], np.float32)), 1)
    assert got.tolist() == [0.5, -0.5, 0.25]
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            fixed.encode(np.array([bad]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.0, 32, 3), "clip is 0.0"),
        ((float("inf"), 32, 3), "clip is inf"),
        ((1.0, 16, 3), "bits is 16"),
        ((1.0, 32, 0), "members is 0"),
        ((1.0, 32, 1 << 24), "take 64 bits"),
    ],
)
def test_an_impossible_form_is_refused(arguments: tuple[float, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FixedPoint(*arguments)  # type: ignore[arg-type]


def test_a_sum_of_more_than_there_is_room_for_is_refused() -> None:
    fixed = FixedPoint(1.0, 32, 3)
    with pytest.raises(ValueError, match="sum is of 4 vectors, with room for 3"):
        fixed.decode(np.zeros(2, np.uint32), 4)

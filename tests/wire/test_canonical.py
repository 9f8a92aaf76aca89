"""Canonical JSON beside RFC 8785's own examples, and beside Python's where the two agree."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.wire import WireError
from anabranch.wire.canonical import LARGEST_INT, canonical, parse_canonical

LIMIT = 1 << 20

# Appendix B: the bits of a double, and how ECMAScript spells it.
NUMBERS = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


@pytest.mark.parametrize(("bits", "text"), NUMBERS.items())
def test_numbers_are_spelled_as_the_rfc_lists_them(bits: str, text: str) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical(value) == text.encode()
    assert parse_canonical(text.encode(), LIMIT) == value


def test_the_rfc_example() -> None:
    text = r"""
    {"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
     "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
     "literals": [null, true, false]}"""
    wanted = (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert canonical(json.loads(text)) == wanted.encode()


def test_keys_are_sorted_by_their_utf_16_as_the_rfc_shows() -> None:
    order = ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    found = json.loads(canonical(dict.fromkeys(sorted(order), 0)))
    assert list(found) == order


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-LARGEST_INT, LARGEST_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_what_was_spelled_is_read_back_and_spelled_again_alike(value: Any) -> None:
    data = canonical(value)
    again = parse_canonical(data, LIMIT)
    # Python compares 1 and 1.0 as equal, which canonical JSON spells alike.
    assert again == value
    assert canonical(again) == data


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", max_codepoint=0xD7FF)),
        st.integers(-LARGEST_INT, LARGEST_INT) | st.text(st.characters(codec="utf-8")),
    )
)
def test_without_fractions_and_rare_letters_it_is_pythons_own(value: dict[str, Any]) -> None:
    plain = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical(value) == plain.encode()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "nan is no number JSON has"),
        (math.inf, "inf is no number JSON has"),
        (LARGEST_INT + 1, "0x20000000000000 is beyond"),
        (-LARGEST_INT - 1, "-0x20000000000000 is beyond"),
        ("\ud800", "surrogates not allowed"),
        ({"\ud800": 1}, "surrogates not allowed"),
        ({1: 2}, "the key 1 is no text"),
        ({1}, "set is nothing JSON has"),
    ],
)
def test_what_json_cannot_hold_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        canonical({"in": [value]})


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "json"),
        (b"{", "json"),
        (b"\xff", "json"),
        (b"[" * 100_000, "json"),
        (b"1" * 100_000, "canonical"),
        (b" 1", "canonical"),
        (b"1.0", "canonical"),
        (b"-0", "canonical"),
        (b"1e5", "canonical"),
        (b"9007199254740993", "canonical"),
        (b"1e999", "canonical"),
        (b"NaN", "canonical"),
        (b"[1, 2]", "canonical"),
        (b'{"b":1,"a":2}', "canonical"),
        (b'{"a":1,"a":1}', "canonical"),
        (b'"\\u0041"', "canonical"),
        (b'"\\ud800"', "canonical"),
        (b'"\\/"', "canonical"),
        (b'"' + b"a" * LIMIT + b'"', "too-large"),
    ],
)
def test_every_other_spelling_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(WireError) as caught:
        parse_canonical(data, LIMIT)
    assert caught.value.code == code


@given(st.binary(max_size=64))
def test_hostile_bytes_end_in_a_refusal_or_in_themselves(data: bytes) -> None:
    try:
        value = parse_canonical(data, LIMIT)
    except WireError:
        return
    assert canonical(value) == data

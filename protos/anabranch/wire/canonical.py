"""Canonical JSON (RFC 8785): one spelling of a value, so that its hash and signature stay true.

Keys are sorted by UTF-16 code units, nothing is put between tokens, strings are escaped as little
as JSON allows, and numbers are spelled as ECMAScript does: 1.0 is ``1``, 1e-7 is ``1e-7``.
Integers beyond 2⁵³ − 1 are refused, since a reader that knows doubles alone would change them.
Loads no torch.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from anabranch.wire.errors import WireError

LARGEST_INT = 2**53 - 1


def number(value: float | None) -> float | None:
    """A number as JSON can hold it: None stands for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value, in UTF-8.

    Args:
        value: None, bool, int, float, str, and lists, tuples and dicts of them.

    Raises:
        ValueError: A number JSON or a double cannot hold, half a surrogate pair, a key that is no
            text, or another type.
    """
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts).encode()


def parse_canonical(data: bytes, limit_bytes: int) -> Any:
    """Read a value in its one spelling.

    Args:
        data: The bytes, as they came.
        limit_bytes: More are refused before any is looked at.

    Raises:
        WireError: ``too-large``; ``json``; or ``canonical``: the same value is spelled otherwise.
    """
    if len(data) > limit_bytes:
        raise WireError("too-large", f"{len(data)} bytes, at most {limit_bytes} are read")
    try:
        value = json.loads(data.decode(), parse_int=_integer)
    # RecursionError: brackets nested deeper than Python goes.
    except (ValueError, RecursionError) as error:
        raise WireError("json", f"it cannot be read as JSON: {error}") from error
    try:
        again = canonical(value)
    except (ValueError, RecursionError) as error:
        raise WireError("canonical", f"it has no canonical spelling: {error}") from error
    if again != data:
        raise WireError("canonical", "it is spelled otherwise than canonical JSON (RFC 8785)")
    return value


def _write(value: Any, parts: list[str]) -> None:
    if value is None or isinstance(value, bool):
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, str):
        parts.append(json.dumps(value, ensure_ascii=False))
    elif isinstance(value, int):
        if abs(value) > LARGEST_INT:
            raise ValueError(f"the integer {value:#x} is beyond 2^53 - 1; write it as text")
        parts.append(str(value))
    elif isinstance(value, float):
        parts.append(_number(value))
    elif isinstance(value, list | tuple):
        parts.append("[")
        for index, item in enumerate(value):
            parts.append("," if index else "")
            _write(item, parts)
        parts.append("]")
    elif isinstance(value, dict):
        parts.append("{")
        for index, key in enumerate(sorted(value, key=_utf16)):
            parts.append(("," if index else "") + json.dumps(key, ensure_ascii=False) + ":")
            _write(value[key], parts)
        parts.append("}")
    else:
        raise ValueError(f"{type(value).__name__} is nothing JSON has; convert it first")


def _utf16(key: Any) -> bytes:
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} is no text; JSON has no others")
    return key.encode("utf-16-be")


def _number(value: float) -> str:
    """``Number::toString`` of ECMAScript: the shortest digits are ``repr``'s, placed otherwise."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number JSON has; write null")
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits)).rstrip("0")
    point = len(digits) + exponent
    if len(text) <= point <= 21:
        text = text.ljust(point, "0")
    elif 0 < point <= 21:
        text = f"{text[:point]}.{text[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{text}"
    else:
        fraction = f".{text[1:]}" if len(text) > 1 else ""
        text = f"{text[0]}{fraction}e{point - 1:+d}"
    return f"-{text}" if sign else text


def _integer(text: str) -> int | float:
    """An integer literal; doubles below 10²¹ are spelled like one too."""
    if len(text) <= 17 and abs(number := int(text)) <= LARGEST_INT:
        return number
    return float(text)

"""mergekit's settings: a number, a gradient over the layers, or either by filters on tensor names.

Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from glob import escape
from typing import Any

Setting = tuple[tuple[str, Any], ...]
"""Values by filter, of which the first counts whose filter is part of a tensor's name. The last has
the empty filter, which is part of every name. A list of numbers is a gradient."""


def setting_of(key: str, sources: Sequence[Any]) -> Setting:
    """What is said of a parameter, from the nearest place to the farthest.

    Args:
        key: Its name, for messages.
        sources: As YAML has them: of the model, of all models, the default; None where it is not
            given.

    Raises:
        ValueError: It is given nowhere, for some names only, or as something else.
    """
    found: list[tuple[str, Any]] = []
    for source in sources:
        for part, value in _conditions(key, source):
            found.append((part, value))
            if not part:
                return tuple(found)
    if found:
        raise ValueError(f"{key}: has values by filter only; give one without, for all other names")
    raise ValueError(f"{key}: is missing; give one to every model")


def plain(key: str, setting: Setting) -> Any:
    """The value of a parameter that has to be one for all names and layers.

    Raises:
        ValueError: It is a gradient, or goes by filters.
    """
    ((_, value), *more) = setting
    if more or isinstance(value, list):
        raise ValueError(f"{key}: is by filter or a gradient over layers; give one value")
    return value


def rules(setting: Setting) -> Iterator[tuple[str, Any]]:
    """Its filters as globs, with values; of several that match, the last counts."""
    for part, value in reversed(setting[:-1]):
        yield f"*{escape(part)}*", value


def _conditions(key: str, given: Any) -> Iterator[tuple[str, Any]]:
    """Filter and value of each condition."""
    if given is None or given == []:
        return
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        given = [given] if isinstance(given, dict) else [{"value": given}]
    for one in given:
        if not one.keys() <= {"value", "filter"} or one.get("value") is None:
            raise ValueError(f"{key}: {one!r} is no value with a filter; give value, and filter")
        part = one.get("filter")
        yield "" if part in (None, "*") else str(part), _value(key, one["value"])


def _value(key: str, given: Any) -> Any:
    """A number, a word for yes or no, or a gradient of numbers."""
    if isinstance(given, list):
        points = [_value(key, point) for point in given]
        if not points or any(isinstance(point, bool | list) for point in points):
            raise ValueError(f"{key}: {given} is no gradient; give numbers")
        return points[0] if len(points) == 1 else points
    if isinstance(given, str):
        # YAML takes 1e-3 for a word.
        try:
            return float(given)
        except ValueError:
            raise ValueError(f"{key}: {given!r} is no number") from None
    if not isinstance(given, bool | int | float):
        raise ValueError(f"{key}: {given!r} is no number")
    return given

"""Leaving contributions out of a merge, as if they had never been there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from anabranch.aggregation.recipe import Number, Recipe


@dataclass(frozen=True)
class Remaining:
    """Who is left, and a recipe for them.

    Attributes:
        indices: Places of the contributions that stay, in order.
        names: Their names.
        recipe: The recipe with their weights alone, in its rules too.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    recipe: Recipe


def remaining(
    names: Sequence[str],
    without: Sequence[str],
    recipe: Recipe,
    weights: Sequence[float] | None = None,
) -> Remaining:
    """The contributions that stay, and the recipe with their weights: the caller's, else its own.

    What is merged then, and which random numbers each contribution draws, depends on those that
    stay alone: the result is that of a merge which never had the others, bit for bit.

    Args:
        names: Every contribution's name.
        without: Names to leave out: as given, or the last part where a name is a path.
        recipe: How they are merged.
        weights: Weight per contribution of ``names``, in place of the recipe's. Rules on modules
            win over either.

    Raises:
        ValueError: A name that nobody or more than one has, nobody left, or not one weight for
            each.
    """
    gone = {place(name, names, "without") for name in without}
    stay = tuple(index for index in range(len(names)) if index not in gone)
    if names and not stay:
        raise ValueError(f"without: leaves none of {', '.join(names)}; keep at least one")
    given = recipe.weights if weights is None else tuple(weights)

    def kept(weights: tuple[Number | None, ...] | None, key: str) -> tuple[Any, ...] | None:
        if weights is None:
            return None
        if len(weights) != len(names):
            raise ValueError(
                f"{key}: {len(weights)} for {len(names)} contributions; give one for each"
            )
        return tuple(weights[index] for index in stay)

    rules = tuple(
        rule.model_copy(update={"weights": kept(rule.weights, f"modules.{number}.weights")})
        for number, rule in enumerate(recipe.modules)
    )
    mine = recipe.model_copy(update={"weights": kept(given, "weights"), "modules": rules})
    return Remaining(stay, tuple(names[index] for index in stay), mine)


def place(wanted: str, names: Sequence[str], key: str) -> int:
    """Which contribution a name stands for: its whole name, or the last part of a path.

    Args:
        wanted: The name.
        names: Every contribution's.
        key: What asks, for messages.

    Raises:
        ValueError: Nobody, or more than one, is called so.
    """
    exact = [index for index, name in enumerate(names) if PurePath(name) == PurePath(wanted)]
    found = exact or [index for index, name in enumerate(names) if PurePath(name).name == wanted]
    if not found:
        raise ValueError(f"{key}: {wanted!r} is none of {', '.join(names)}; name one of these")
    if len(found) > 1:
        which = ", ".join(names[index] for index in found)
        raise ValueError(f"{key}: {wanted!r} may be any of {which}; give its whole name")
    return found[0]

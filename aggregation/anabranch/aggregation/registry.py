"""Which merge methods there are: the built-in tuple and the entry-point group."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from pydantic import ValidationError

from anabranch.aggregation.composition import composed, is_composition
from anabranch.aggregation.method import MergeMethod, MethodConfig
from anabranch.aggregation.methods import BUILT_IN
from anabranch.aggregation.preset import MERGES_BY
from anabranch.aggregation.recipe import ROBUST, Recipe, validation_line
from anabranch.aggregation.robust import PRE_AGGREGATORS
from anabranch.aggregation.robust.pre import PreAggregator

ENTRY_POINT_GROUP = "anabranch.merge_methods"


def register(methods: Iterable[MergeMethod]) -> dict[str, MergeMethod]:
    """Methods by name.

    Raises:
        ValueError: Two methods share a name.
    """
    table: dict[str, MergeMethod] = {}
    for method in methods:
        if method.name in table:
            raise ValueError(f"merge method {method.name!r} is registered twice; rename one")
        table[method.name] = method
    return table


@cache
def methods() -> dict[str, MergeMethod]:
    """Built-in methods, then those other packages register under the entry-point group."""
    third_party = [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    return register([*BUILT_IN, *third_party])


def named(recipe: Recipe, source: str = "recipe") -> MergeMethod:
    """The recipe's method: a registered one, or a composition.

    Args:
        recipe: What names it.
        source: Where it came from, for messages.

    Raises:
        ValueError: There is no such method; lists those there are.
    """
    if is_composition(recipe.method):
        try:
            return composed(recipe.method)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    known = methods()
    if recipe.method == ROBUST:
        return known[MERGES_BY]
    if recipe.method not in known:
        raise ValueError(
            f"{source}: method: {recipe.method!r} is not a merge method; "
            f"choose from {', '.join(sorted(known))}, {ROBUST}, "
            "or compose one, such as trim + sign + mean"
        )
    return known[recipe.method]


def resolve_pre(
    recipe: Recipe, method: MergeMethod, source: str = "recipe"
) -> tuple[tuple[PreAggregator, MethodConfig], ...]:
    """The steps before the recipe's method, with their validated parameters.

    Args:
        recipe: What to resolve.
        method: Its method.
        source: Where it came from, for messages.

    Raises:
        ValueError: An unknown step, a bad parameter, or a method or weights that no step can go
            before.
    """
    known = {step.name: step for step in PRE_AGGREGATORS}
    found = []
    for number, asked in enumerate(recipe.pre):
        if asked.name not in known:
            raise ValueError(
                f"{source}: pre.{number}.name: {asked.name!r} is no pre-aggregation; "
                f"choose from {', '.join(sorted(known))}"
            )
        step = known[asked.name]
        try:
            found.append((step, step.config.model_validate(asked.params)))
        except ValidationError as error:
            raise ValueError(validation_line(error, source, f"pre.{number}.params")) from error
    if found and method.needs_names:
        raise ValueError(
            f"{source}: pre: {method.name} singles out a contribution by name, and mixtures have "
            "none; leave pre out"
        )
    if found and (method.matrices is not None or method.factors or method.needs_importance):
        raise ValueError(
            f"{source}: pre: {method.name} takes whole matrices, factors or importance, which are "
            "not mixed; leave pre out, or choose a method on entries such as ties or median"
        )
    return tuple(found)


def resolve(recipe: Recipe, source: str = "recipe") -> tuple[MergeMethod, MethodConfig]:
    """The recipe's method with its validated parameters; its rules on modules are not read.

    Args:
        recipe: What to resolve, without gradients.
        source: Where it came from, for messages.

    Raises:
        ValueError: Unknown method or bad parameter, in one line that names the key and the fix.
    """
    method = named(recipe, source)
    try:
        config = method.config.model_validate(recipe.params)
    except ValidationError as error:
        raise ValueError(validation_line(error, source, "params")) from error
    return method.at(config), config

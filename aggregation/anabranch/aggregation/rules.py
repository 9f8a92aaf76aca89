"""What a recipe says of each module, once its rules and its gradients are worked out.

Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from anabranch.aggregation.layers import depths, interpolated
from anabranch.aggregation.recipe import ModuleRule, Recipe

_FACTORS = (".lora_A", ".lora_B")


@dataclass(frozen=True)
class Settings:
    """How one module is merged, in plain numbers.

    Attributes:
        params: The method's parameters.
        weights: Weight per contribution, None counts each once.
        scale: Factor on the merged task vector.
        excluded: Whether the module stays as the start or the base has it.
    """

    params: Mapping[str, Any]
    weights: tuple[float, ...] | None
    scale: float
    excluded: bool


def settings_by_module(
    recipe: Recipe, modules: Iterable[str]
) -> list[tuple[Settings, tuple[str, ...]]]:
    """Modules that are merged alike, with how; in the order of the modules.

    Args:
        recipe: The recipe.
        modules: All of the model's, or of the adapter's. A factor that is merged alone goes by the
            name of its module.

    Raises:
        ValueError: A rule that no module matches; names it.
    """
    called = {module: _called(module) for module in modules}
    for number, rule in enumerate(recipe.modules):
        if not any(fnmatchcase(name, rule.match) for name in called.values()):
            example = next(iter(called.values()), "none")
            raise ValueError(
                f"modules.{number}.match: {rule.match!r} matches none of the {len(called)} "
                f"modules, such as {example}; correct it, or leave the rule out"
            )
    depth = depths(called.values())
    alike: dict[str, tuple[Settings, list[str]]] = {}
    for module, name in called.items():
        settings = _settings(recipe, name, depth[name])
        key = json.dumps(asdict(settings), sort_keys=True, default=str)
        alike.setdefault(key, (settings, []))[1].append(module)
    return [(settings, tuple(names)) for settings, names in alike.values()]


def _called(module: str) -> str:
    for suffix in _FACTORS:
        module = module.removesuffix(suffix)
    return module


def _settings(recipe: Recipe, name: str, depth: float) -> Settings:
    """The recipe at one module; later rules win over earlier ones, key by key."""
    params: dict[str, Any] = recipe.params
    weights, scale, excluded = recipe.weights, recipe.scale, False
    for rule in recipe.modules:
        if not fnmatchcase(name, rule.match):
            continue
        params = _over(params, rule.params)
        weights = _weights(weights, rule)
        scale = scale if rule.scale is None else rule.scale
        excluded = excluded if rule.exclude is None else rule.exclude
    return Settings(
        _at(params, depth),
        None if weights is None else tuple(_at(weight, depth) for weight in weights),
        _at(scale, depth),
        excluded,
    )


def _weights(before: tuple[Any, ...] | None, rule: ModuleRule) -> tuple[Any, ...] | None:
    if rule.weights is None:
        return before
    kept = before or (1.0,) * len(rule.weights)
    return tuple(old if new is None else new for old, new in zip(kept, rule.weights, strict=True))


def _over(params: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with others laid over them; tables inside are merged in the same way."""
    merged = dict(params)
    for key, value in other.items():
        old = merged.get(key)
        tables = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _over(cast(Mapping[str, Any], old), value) if tables else value
    return merged


def _at(value: Any, depth: float) -> Any:
    """A setting at a depth: every list of numbers in it is a gradient."""
    if isinstance(value, Mapping):
        return {key: _at(inner, depth) for key, inner in value.items()}
    if isinstance(value, list | tuple) and value and all(_is_number(point) for point in value):
        return interpolated(value, depth)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

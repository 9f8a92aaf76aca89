"""mergekit's YAML as a recipe: what its users have already written.

Only what comes out as mergekit 0.1.5 has it is taken over; the rest is refused in a line that says
what to write instead. Where a method here rounds less, breaks ties otherwise or draws other masks,
``tests/conformance`` and the warnings say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from anabranch.aggregation.mergekit.methods import (
    AS_HERE,
    DEFAULTS,
    IGNORED,
    METHODS,
    MergekitMethod,
)
from anabranch.aggregation.mergekit.settings import Setting, plain, rules, setting_of
from anabranch.aggregation.recipe import Recipe, validation_line

_KEYS = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype")
_OTHER_KEYS = {
    "slices": "layers of different models are not put together here; list whole models",
    "modules": "list whole models under models:",
    "tokenizer": "vocabularies are not united here; merge models of one tokenizer",
    "chat_template": "the base's is kept; leave it out",
}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class MergekitJob:
    """A mergekit configuration, said in our words.

    Attributes:
        recipe: Method, parameters, scale and weights.
        models: What to merge, in order.
        base: What they are task vectors against, None for none.
        dtype: What to store the result in, None for the base's.
        warnings: What is otherwise than in mergekit, one line each.
    """

    recipe: Recipe
    models: tuple[Path, ...]
    base: Path | None
    dtype: Literal["float32", "float16", "bfloat16"] | None
    warnings: tuple[str, ...]


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a file's table is a mergekit configuration."""
    return "merge_method" in data


def from_mergekit(data: Mapping[str, Any], source: str) -> MergekitJob:
    """Take a mergekit configuration over.

    Args:
        data: The YAML's table.
        source: The file, for messages.

    Raises:
        ValueError: What has no like here, in one line that names the key and the fix.
    """
    for key in data:
        if key in _OTHER_KEYS:
            raise ValueError(f"{source}: {key}: {_OTHER_KEYS[key]}")
        if key == "tokenizer_source" and data[key] in (None, "base"):
            continue
        if key not in _KEYS:
            raise ValueError(f"{source}: {key}: is not supported; remove it")
    method = METHODS.get(str(data["merge_method"]))
    if method is None:
        raise ValueError(
            f"{source}: merge_method: {data['merge_method']!r} has no like here; choose from "
            f"{', '.join(sorted(METHODS))}"
        )
    reader = _Reader(data, source)
    base, entries = reader.inputs(method)
    found = reader.method(method, entries)
    try:
        recipe = Recipe(**found)
    except ValidationError as error:
        raise ValueError(validation_line(error, source)) from error
    if method.random:
        reader.warnings.append(
            f"{data['merge_method']}: masks are drawn by our own seed, and what survives is "
            "rescaled by the probability of keeping it, not by L1 norms"
        )
    return MergekitJob(
        recipe, tuple(path for path, _ in entries), base, reader.dtype(), tuple(reader.warnings)
    )


_Entry = tuple[Path, Mapping[str, Any]]


class _Reader:
    """One configuration, with the warnings that reading it leaves."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source
        self.shared = self._table(data.get("parameters"), "parameters")
        self.warnings: list[str] = []

    def inputs(self, method: MergekitMethod) -> tuple[Path | None, list[_Entry]]:
        """The base, None where weights are merged as they are, and models with parameters."""
        listed = self.data.get("models")
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{self.source}: models: must be a list of models")
        entries: list[_Entry] = []
        for place, item in enumerate(listed):
            key = f"models.{place}"
            if not isinstance(item, dict) or not {"model"} <= item.keys() <= {
                "model",
                "parameters",
            }:
                raise ValueError(f"{self.source}: {key}: give model, and parameters if any")
            own = self._table(item.get("parameters"), f"{key}.parameters")
            entries.append((self._path(item["model"], key), own))
        given = self.data.get("base_model")
        base = None if given is None else self._path(given, "base_model")
        others = [entry for entry in entries if entry[0] != base]
        if base is None and method.base in ("origin", "first"):
            raise ValueError(f"{self.source}: base_model: {method.name} needs one; name it")
        if method.base in ("origin", "optional"):
            if not others:
                raise ValueError(f"{self.source}: models: names only the base; list fine-tunes")
            return base, others
        if base is None:
            return None, entries
        if len(others) == len(entries):
            entries = [*entries, (base, {})]
        if method.base == "first":
            entries.sort(key=lambda entry: entry[0] != base)
        return None, entries

    def method(self, method: MergekitMethod, entries: Sequence[_Entry]) -> dict[str, Any]:
        """The fields of the recipe."""
        names = {*method.parameters, *IGNORED, *AS_HERE}
        names |= {"weight", "lambda", "normalize"} if method.weighted else set()
        for place, own in (("parameters", self.shared), *((str(p), own) for p, own in entries)):
            for key in own:
                if key not in names:
                    raise ValueError(
                        f"{self.source}: {place}: {key}: is no parameter of {method.name} here; "
                        "remove it"
                    )
                if key in IGNORED:
                    self.warnings.append(f"{key}: is ignored, {IGNORED[key]}")
        for key, value in AS_HERE.items():
            if self._plain(key, entries, value) != value:
                raise ValueError(
                    f"{self.source}: {key}: {method.name} has it {str(value).lower()} here; "
                    "remove it"
                )
        params: dict[str, Any] = {}
        modules: list[dict[str, Any]] = []
        for theirs, ours in method.parameters.items():
            setting = self._one(theirs, entries, DEFAULTS.get(theirs))
            params[ours] = setting[-1][1]
            modules += [{"match": glob, "params": {ours: value}} for glob, value in rules(setting)]
        if "iterations" in params:
            params["iterations"] = int(self._plain("max_iter", entries, DEFAULTS["max_iter"]))
        recipe: dict[str, Any] = {"method": method.name, "params": params}
        if method.weighted:
            recipe |= self._weighed(method, entries, modules)
        return {**recipe, "modules": modules}

    def _weighed(
        self, method: MergekitMethod, entries: Sequence[_Entry], modules: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Weights and scale, and the method where it follows from them; adds to the rules."""
        weights = [self._setting("weight", own, None) for _, own in entries]
        for place, weight in enumerate(weights):
            alone: list[Any] = [None] * len(weights)
            for glob, alone[place] in rules(weight):
                modules.append({"match": glob, "weights": tuple(alone)})
        scale = self._one("lambda", entries, 1.0)
        normalize = method.normalize is None or self._plain("normalize", entries, method.normalize)
        recipe: dict[str, Any] = {}
        if not normalize and method.summed == "task_arithmetic":
            recipe["method"] = method.summed
        elif not normalize and method.summed == "scale":
            try:
                total = sum(plain("weight", weight) for weight in weights)
            except ValueError:
                raise ValueError(
                    f"{self.source}: parameters.normalize: {method.name} sums by a factor of all "
                    "weights together, which cannot go by filter or layer; set normalize: true"
                ) from None
            scale = tuple((part, _times(value, total)) for part, value in scale)
        elif not normalize:
            raise ValueError(
                f"{self.source}: parameters.normalize: {method.name} divides by the weights that "
                "agree here, mergekit does not unless told; set normalize: true"
            )
        modules += [{"match": glob, "scale": value} for glob, value in rules(scale)]
        return {
            **recipe,
            "weights": tuple(weight[-1][1] for weight in weights),
            "scale": scale[-1][1],
        }

    def dtype(self) -> Literal["float32", "float16", "bfloat16"] | None:
        """What the result is stored in."""
        given = self.data.get("out_dtype") or self.data.get("dtype")
        if given is not None and given not in _DTYPES:
            raise ValueError(
                f"{self.source}: dtype: {given!r} cannot be written; "
                f"choose from {', '.join(_DTYPES)}"
            )
        return cast(Literal["float32", "float16", "bfloat16"] | None, given)

    def _one(self, key: str, entries: Sequence[_Entry], default: Any) -> Setting:
        """A parameter that all models have in common."""
        settings = [self._setting(key, own, default) for _, own in entries]
        if any(setting != settings[0] for setting in settings):
            values = [setting[-1][1] if len(setting) == 1 else "filtered" for setting in settings]
            raise ValueError(
                f"{self.source}: {key}: is {values} for the models; one setting for all of them is "
                "supported"
            )
        return settings[0]

    def _plain(self, key: str, entries: Sequence[_Entry], default: Any) -> Any:
        """The same, of one value for all names and layers."""
        setting = self._one(key, entries, default)
        try:
            return plain(key, setting)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error

    def _setting(self, key: str, own: Mapping[str, Any], default: Any) -> Setting:
        try:
            return setting_of(key, [own.get(key), self.shared.get(key), default])
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error

    def _path(self, given: Any, key: str) -> Path:
        if not isinstance(given, str) or not given:
            raise ValueError(f"{self.source}: {key}: must be the path of a folder")
        path = Path(given).expanduser()
        if not path.exists():
            lora = " an adapter is merged as one, not baked in;" if "+" in given else ""
            raise ValueError(
                f"{self.source}: {key}: there is no {given!r} on this machine;{lora} download the "
                "model and name its folder"
            )
        return path

    def _table(self, given: Any, key: str) -> Mapping[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise ValueError(f"{self.source}: {key}: must be a table of keys")
        return given


def _times(value: Any, factor: float) -> Any:
    """A number, or every point of a gradient, times a factor."""
    return [point * factor for point in value] if isinstance(value, list) else value * factor

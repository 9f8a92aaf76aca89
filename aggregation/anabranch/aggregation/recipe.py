"""Recipes: how a cohort is merged. Loads no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from anabranch.aggregation.backdoor.config import SuspicionConfig

ROBUST = "robust"
"""The method that stands for a composition, and the one recipe that is a word."""


class Refactor(BaseModel):
    """How the merged ΔW becomes an adapter again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["svd", "stack"] = "svd"
    """``svd``: best rank-r approximation, error reported. ``stack``: exact, rank Σ r_i (linear
    and spectral methods)."""
    rank: int | None = Field(None, ge=1)
    """Target rank; None keeps each module's largest input rank."""
    align: bool = True
    """Rotate the new factors towards the round's start (orthogonal Procrustes). ΔW is unchanged;
    error feedback kept in factor space stays pointed the right way."""


_KINDS = ("a number", "a gradient")
"""Tags by which pydantic tells the two apart; messages leave them out."""


def _kind(value: Any) -> str:
    return _KINDS[isinstance(value, list | tuple)]


_Above0 = Annotated[float, Field(gt=0)]

Number = Annotated[
    Annotated[float, Tag(_KINDS[0])]
    | Annotated[tuple[float, ...], Field(min_length=1), Tag(_KINDS[1])],
    Discriminator(_kind),
]
"""One number in all layers, or a gradient: points from the first layer to the last."""

Scale = Annotated[
    Annotated[_Above0, Tag(_KINDS[0])]
    | Annotated[tuple[_Above0, ...], Field(min_length=1), Tag(_KINDS[1])],
    Discriminator(_kind),
]
"""The same, above zero."""


class ModuleRule(BaseModel):
    """What is otherwise in some modules. Later rules win over earlier ones, key by key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    match: str = Field(min_length=1)
    """Which modules: a glob on their names, such as ``*.mlp.*``; it must match one at least."""
    exclude: bool | None = None
    """Leave these modules as the start or the base has them: their merged task vector is zero."""
    weights: tuple[Number | None, ...] | None = None
    """Weight per contribution, in order; null (in YAML) leaves one as it was."""
    scale: Scale | None = None
    """Factor on the merged task vector."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the method, laid over the recipe's."""


class PreStep(BaseModel):
    """A pre-aggregation, before the method."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    """``oversized``, ``clip``, ``alike``, ``arc``, ``nnm``, ``bucketing``, ``unit_norm`` or
    ``dedup``."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Its own parameters."""


class Recipe(BaseModel):
    """How a cohort is merged: method, scale, and the way back to rank r.

    A list of numbers for a weight, for the scale or for a parameter is a gradient over the layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    """A registered merge method; ``anabranch methods`` lists them. ``robust`` stands for steps and
    a method chosen for ``params.f`` malicious contributions (``preset.py``)."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The method's own parameters."""
    pre: tuple[PreStep, ...] = ()
    """Steps before the method, in order: robust mixtures of the contributions, in which each counts
    once, whatever its weight."""
    suspicion: SuspicionConfig | None = None
    """Which adapters stand out from the others, before anything else sees them; None: nobody
    looks."""
    scale: Scale = 1.0
    """Factor on the merged task vector (λ in the papers)."""
    weights: tuple[Number, ...] | None = None
    """Weight per contribution, in order; None counts each once."""
    modules: tuple[ModuleRule, ...] = ()
    """What is otherwise in some modules. Those that are merged alike are merged as a model of their
    own: a method that looks at the whole model looks at these."""
    refactor: Refactor = Refactor()

    @property
    def has_steps(self) -> bool:
        """Whether anything goes before the method."""
        return bool(self.pre) or self.method == ROBUST

    @model_validator(mode="before")
    @classmethod
    def _may_be_a_word(cls, given: Any) -> Any:
        if given == ROBUST:
            return {"method": ROBUST}
        if isinstance(given, str):
            raise PydanticCustomError(
                "recipe", 'is a table of keys, or the word "robust", not {given}', {"given": given}
            )
        return given


def validation_line(error: ValidationError, source: str, prefix: str = "") -> str:
    """The first problem of a pydantic error as one line: file, key, reason.

    Args:
        error: What pydantic raised.
        source: The file or place the values came from.
        prefix: Where inside the source the validated table stands, such as ``recipe``.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in (prefix, *first["loc"]) if part not in ("", *_KINDS))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    given = first.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{source}: {key or 'the whole file'}: {first['msg']}{shown}{more}"


def read_config(path: Path) -> dict[str, Any]:
    """A TOML or YAML file as a table.

    Raises:
        ValueError: Unreadable file, broken syntax or no table at the top, in one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason}); name a TOML or YAML file") from error
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: broken {path.suffix.lstrip('.') or 'YAML'}: {reason}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds no table of keys; see examples/ for one that works")
    return data


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file (``.toml``, ``.yaml``, ``.yml``); a ``[recipe]`` table is accepted too.

    Raises:
        ValueError: One line that names the file, the key and the reason.
    """
    data = read_config(path)
    table = data.get("recipe", data)
    if not isinstance(table, dict) and table != ROBUST:
        raise ValueError(f'{path}: recipe: must be a table of keys, or "{ROBUST}"')
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise ValueError(validation_line(error, str(path))) from error

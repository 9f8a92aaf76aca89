"""The methods that mergekit has too, and how each is said here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods, and how it is said here.

    Attributes:
        name: The method here.
        base: ``origin``: task vectors against ``base_model``. ``input``: a model like the others.
            ``optional``: the first if there is one. ``first``: the first of two.
        parameters: The method's own parameters, there and here.
        weighted: Whether it takes weights, and lambda.
        normalize: mergekit's default; None where there is no such parameter.
        summed: What to do if not normalised: another method, a factor Σw, or nothing will do.
        random: Whether masks are drawn.
    """

    name: str
    base: Literal["origin", "input", "optional", "first"]
    parameters: Mapping[str, str]
    weighted: bool = True
    normalize: bool | None = None
    summed: Literal["task_arithmetic", "scale", "refuse"] = "refuse"
    random: bool = False


_DENSITY = {"density": "density"}
_BAND = {**_DENSITY, "gamma": "gamma"}
_RANKED = {**_DENSITY, "epsilon": "epsilon"}
METHODS = {
    "linear": MergekitMethod("mean", "input", {}, normalize=True, summed="task_arithmetic"),
    "task_arithmetic": MergekitMethod(
        "mean", "origin", {}, normalize=False, summed="task_arithmetic"
    ),
    "ties": MergekitMethod("ties", "origin", _DENSITY, normalize=True),
    "dare_linear": MergekitMethod(
        "dare_linear", "origin", _DENSITY, normalize=False, summed="scale", random=True
    ),
    "dare_ties": MergekitMethod("dare_ties", "origin", _DENSITY, normalize=False, random=True),
    "breadcrumbs": MergekitMethod("breadcrumbs", "origin", _BAND, normalize=False, summed="scale"),
    "breadcrumbs_ties": MergekitMethod("breadcrumbs_ties", "origin", _BAND, normalize=False),
    "della": MergekitMethod("della", "origin", _RANKED, normalize=True, random=True),
    "della_linear": MergekitMethod(
        "della_linear", "origin", _RANKED, normalize=False, summed="scale", random=True
    ),
    "sce": MergekitMethod("sce", "origin", {"select_topk": "select"}, weighted=False),
    "model_stock": MergekitMethod("model_stock", "origin", {}, weighted=False),
    "multislerp": MergekitMethod("multi_slerp", "optional", {}),
    "slerp": MergekitMethod("slerp", "first", {"t": "t"}, weighted=False),
    "karcher": MergekitMethod(
        "karcher", "input", {"max_iter": "iterations", "tol": "tolerance"}, weighted=False
    ),
}
DEFAULTS: dict[str, float] = {
    "density": 1.0,
    "gamma": 0.01,
    "epsilon": 0.15,
    "select_topk": 1.0,
    "max_iter": 10,
    "tol": 1e-5,
}
AS_HERE: dict[str, Any] = {"normalize_weights": True, "filter_wise": False, "rescale": True}
"""Switches that stand one way here."""

IGNORED = {
    "int8_mask": "masks take no extra memory here",
    "eps": "nothing is divided by zero here",
}

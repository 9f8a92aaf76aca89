"""Our side: a recipe by declared number of attackers, and how a rule merges vectors.

Hyper-parameters are the rules' defaults, chosen before the first cell and the same everywhere: what
a rule may know is how many attack.

Shape legend: C contributions, D entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anabranch.aggregation import Recipe, merge_task_vectors
from anabranch.vectors import TaskVector

OURS = "Anabranch"


@dataclass(frozen=True)
class Rule:
    """A row of the board.

    Attributes:
        name: Of the row.
        whose: Whose code it is, with its version.
        merge: ``merge(deltas_CD, declared) -> merged_D``, which may keep what it is given; a
            ``ValueError`` where it cannot.
        note: What to know when reading its row.
    """

    name: str
    whose: str
    merge: Callable[[Tensor, int], Tensor]
    note: str = ""


ByDeclared = Callable[[int], Mapping[str, Any]]
"""A recipe's keys by how many attackers are declared."""


def _step(name: str, **params: Any) -> dict[str, Any]:
    return {"name": name, "params": params}


RECIPES: Mapping[str, ByDeclared] = {
    # What it stands for: aggregation/preset.py.
    "robust": lambda f: {"method": "robust", "params": {"f": f}},
    "mean": lambda f: {"method": "mean"},
    "clipped mean": lambda f: {"method": "mean", "pre": [_step("clip")]},
    "median": lambda f: {"method": "median"},
    "trimmed mean": lambda f: {"method": "trimmed_mean", "params": {"trim": f}},
    "mean around median": lambda f: {"method": "meamed", "params": {"f": f}},
    "geometric median": lambda f: {"method": "geometric_median"},
    "Multi-Krum": lambda f: {"method": "multi_krum", "params": {"f": f}},
    "Bulyan": lambda f: {"method": "bulyan", "params": {"f": f}},
    "DnC": lambda f: {"method": "dnc", "params": {"f": f}},
    "FLAME": lambda f: {"method": "flame"},
    "FoolsGold": lambda f: {"method": "foolsgold"},
    "centred clipping": lambda f: {"method": "centred_clipping"},
    "CAF": lambda f: {"method": "caf", "params": {"f": f}},
    "NNM, mean": lambda f: {"method": "mean", "pre": [_step("nnm", f=f)]},
    "NNM, trimmed mean": lambda f: {
        "method": "trimmed_mean", "params": {"trim": f}, "pre": [_step("nnm", f=f)],
    },
    "NNM, geometric median": lambda f: {
        "method": "geometric_median", "pre": [_step("nnm", f=f)],
    },
    "ARC, NNM, trimmed mean": lambda f: {
        "method": "trimmed_mean", "params": {"trim": f},
        "pre": [_step("arc", f=f), _step("nnm", f=f)],
    },
    "ARC, NNM, geometric median": lambda f: {
        "method": "geometric_median", "pre": [_step("arc", f=f), _step("nnm", f=f)],
    },
    "ARC, CAF": lambda f: {
        "method": "caf", "params": {"f": f}, "pre": [_step("arc", f=f)],
    },
    "ARC, NNM, CAF": lambda f: {
        "method": "caf", "params": {"f": f}, "pre": [_step("arc", f=f), _step("nnm", f=f)],
    },
    "bucketing, geometric median": lambda f: {
        "method": "geometric_median", "pre": [_step("bucketing", size=2)],
    },
    "TIES": lambda f: {"method": "ties"},
    "rank vote": lambda f: {"method": "rank_vote"},
    "sign vote": lambda f: {"method": "sign_vote"},
}  # fmt: skip
"""Ours by name."""


NOTES: Mapping[str, str] = {
    "FoolsGold": "every attack here sends copies, which are what it looks for: attackers who vary "
    "what they send are not seen, and honest clients who agree are",
    "NNM, mean": "an attacker's own mixture keeps what it sent, so it takes a robust rule after it",
    "TIES": "does not estimate the mean, so the figure counts its scale against it; one value of "
    "any size wins an entry that the others trim",
    "sign vote": "does not estimate the mean, so the figure counts its scale against it",
    "rank vote": "does not estimate the mean, so the figure counts its scale against it",
}
"""What to know when reading a row."""


def recipe(name: str, declared: int) -> Recipe:
    """One of ours as a recipe."""
    return Recipe.model_validate(RECIPES[name](declared))


def merge_vectors(deltas_CD: Tensor, how: Recipe) -> Tensor:
    """By the engine, as one matrix: what a federation calls.

    Args:
        deltas_CD: Task vectors [C, D].
        how: The recipe.

    Returns:
        Merged entries [D].

    Raises:
        ValueError: It cannot be merged so.
    """
    # In rows: those are what the engine cuts to its budget.
    rows = math.gcd(deltas_CD.shape[1], 1000)
    vectors = [TaskVector({"m": delta_D.view(rows, -1)}) for delta_D in deltas_CD]
    merged = merge_task_vectors(vectors, how)
    total = merged.deltas["m"]
    assert isinstance(total, Tensor)
    return total.flatten()


def our_rules() -> tuple[Rule, ...]:
    """All of ours."""

    def rule(name: str) -> Rule:
        def merge(deltas_CD: Tensor, f: int) -> Tensor:
            return merge_vectors(deltas_CD, recipe(name, f))

        return Rule(name, OURS, merge, NOTES.get(name, ""))

    return tuple(rule(name) for name in RECIPES)

"""Merges task vectors and adapters: methods, recipes, and the engine that runs them.

Names load on first use, so that reading a recipe (``anabranch.aggregation.recipe``) loads no torch.
The table of methods is ``anabranch.aggregation.registry.methods()``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.aggregation.backdoor.on_data import merge_on_data
    from anabranch.aggregation.checkpoints.merge import CheckpointReport, merge_checkpoints
    from anabranch.aggregation.engine.adapters import MergeReport, MergeResult
    from anabranch.aggregation.engine.adapters import merge_adapters as merge
    from anabranch.aggregation.engine.gram import cosine_similarity
    from anabranch.aggregation.engine.keep import merge_keeping
    from anabranch.aggregation.engine.one_factor import merge_one_factor
    from anabranch.aggregation.engine.stream import merge_task_vectors
    from anabranch.aggregation.engine.truncate import truncate
    from anabranch.aggregation.method import MergeMethod, MethodConfig
    from anabranch.aggregation.methods.opcm import OpcmState, merge_next
    from anabranch.aggregation.planning.merge_plan import MergePlan
    from anabranch.aggregation.planning.planner import plan_merge
    from anabranch.aggregation.recipe import ModuleRule, Recipe, load_recipe
    from anabranch.aggregation.registry import resolve

_HOMES = {
    "CheckpointReport": "checkpoints.merge",
    "MergeMethod": "method",
    "MergePlan": "planning.merge_plan",
    "MergeReport": "engine.adapters",
    "MergeResult": "engine.adapters",
    "MethodConfig": "method",
    "ModuleRule": "recipe",
    "OpcmState": "methods.opcm",
    "Recipe": "recipe",
    "cosine_similarity": "engine.gram",
    "load_recipe": "recipe",
    "merge": "engine.adapters",
    "merge_next": "methods.opcm",
    "merge_checkpoints": "checkpoints.merge",
    "merge_keeping": "engine.keep",
    "merge_on_data": "backdoor.on_data",
    "merge_one_factor": "engine.one_factor",
    "merge_task_vectors": "engine.stream",
    "plan_merge": "planning.planner",
    "resolve": "registry",
    "truncate": "engine.truncate",
}
_RENAMED = {"merge": "merge_adapters"}

__all__ = [
    "CheckpointReport",
    "MergeMethod",
    "MergePlan",
    "MergeReport",
    "MergeResult",
    "MethodConfig",
    "ModuleRule",
    "OpcmState",
    "Recipe",
    "cosine_similarity",
    "load_recipe",
    "merge",
    "merge_checkpoints",
    "merge_keeping",
    "merge_next",
    "merge_on_data",
    "merge_one_factor",
    "merge_task_vectors",
    "plan_merge",
    "resolve",
    "truncate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(module, _RENAMED.get(name, name))

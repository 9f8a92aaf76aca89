"""Plans a merge: everything that can be refused without a tensor is refused here.

That is before the first of many gigabytes is read, and not after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anabranch.aggregation.checkpoints.inputs import open_inputs
from anabranch.aggregation.checkpoints.merge import check_groups
from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES
from anabranch.aggregation.engine.suspected import check_not_judged
from anabranch.aggregation.planning.adapters import plan_adapters
from anabranch.aggregation.planning.checkpoints import plan_checkpoints
from anabranch.aggregation.planning.merge_plan import Kind, MergePlan
from anabranch.aggregation.ranks import Ranks
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import named
from anabranch.aggregation.withdrawal import remaining
from anabranch.vectors.peft_config import CONFIG_FILE


def plan_merge(
    inputs: Sequence[Path],
    recipe: Recipe,
    *,
    base: Path | None = None,
    start: Path | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    without: Sequence[str] = (),
    dtype: str | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ranks: int = 1,
) -> MergePlan:
    """Say what merging PEFT folders, or checkpoints, will do; no tensor is read.

    Args:
        inputs: PEFT adapter folders or checkpoints, never both.
        recipe: How to merge them.
        base: What checkpoints were fine-tuned from.
        start: The adapter that adapters started from.
        weights: Weight per input, where no rule says otherwise; None takes the recipe's.
        names: What to call the inputs; None takes their paths.
        without: Names of inputs to leave out.
        dtype: What a merged checkpoint is stored in; None keeps the base's.
        budget_bytes: Memory for entries, of all ranks together.
        ranks: How many processes of this machine merge together.

    Raises:
        ValueError: What the merge would refuse, in one line with the reason and the fix.
    """
    budget_bytes //= ranks
    method = named(recipe)
    kind = kind_of(inputs)
    stay = remaining(
        [str(path) for path in inputs] if names is None else names, without, recipe, weights
    )
    inputs = [inputs[index] for index in stay.indices]
    if kind == "checkpoints":
        check_not_judged(recipe.suspicion, "checkpoints")
        if start is not None:
            raise ValueError(
                f"{start}: --start is for adapters; name what checkpoints share as --base"
            )
        opened = open_inputs(inputs, base, stay.names, method)
        parts = groups(stay.recipe, opened.cohort.deltas, len(inputs))
        shared = replace(opened.cohort, ranks=Ranks(0, ranks, ranks))
        warnings = check_groups(parts, shared, base, budget_bytes)
        plan = plan_checkpoints(opened, parts, dtype, budget_bytes, ranks)
        return replace(plan, warnings=(*warnings, *plan.warnings))
    if base is not None:
        raise ValueError(
            f"{base}: --base is for checkpoints; adapters say themselves what they add"
        )
    return plan_adapters(inputs, stay.names, start, stay.recipe, budget_bytes, ranks)


def kind_of(inputs: Sequence[Path]) -> Kind:
    """Whether these are adapters or checkpoints.

    Raises:
        ValueError: None given, or some of each.
    """
    if not inputs:
        raise ValueError("nothing to merge: name at least one adapter folder or checkpoint")
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path}: is not there; name an adapter folder or a checkpoint")
    adapters = [path for path in inputs if (path / CONFIG_FILE).is_file()]
    others = [path for path in inputs if path not in adapters]
    if adapters and others:
        raise ValueError(
            f"{others[0]}: holds no {CONFIG_FILE}, and {adapters[0]} does; merge adapters or "
            "checkpoints, not both at once"
        )
    if adapters:
        return "adapters"
    for path in others:
        # What is neither is more often a mistyped adapter than a mistyped model.
        whole = path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
        if not whole or (path / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"{path}: is no adapter folder ({CONFIG_FILE}) and no checkpoint "
                "(model.safetensors); name a folder that PEFT or transformers saved"
            )
    return "checkpoints"

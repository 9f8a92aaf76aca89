"""Merges checkpoints by a recipe: rows are read, merged and written, a stretch at a time.

Shape legend: C contributions, R rows of a chunk, n columns, L entries of a stretch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anabranch.aggregation.checkpoints.inputs import Inputs, open_inputs, pieces
from anabranch.aggregation.checkpoints.merged_rows import check_budget, merged_rows
from anabranch.aggregation.engine.cohort import Cohort, contribution_names
from anabranch.aggregation.engine.device import placed
from anabranch.aggregation.engine.groups import Group, groups
from anabranch.aggregation.engine.job import Progress
from anabranch.aggregation.engine.rows import DEFAULT_BUDGET_BYTES
from anabranch.aggregation.engine.shard import shared_folder
from anabranch.aggregation.engine.suspected import check_not_judged
from anabranch.aggregation.method import MergeMethod
from anabranch.aggregation.ranks import ALONE, Ranks
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import named
from anabranch.aggregation.robust.pre import mixing
from anabranch.aggregation.withdrawal import remaining
from anabranch.vectors.checkpoint import copy_companions, fill_checkpoint, lay_out_checkpoint
from anabranch.vectors.new_folder import write_text

DEFAULT_SHARD_BYTES = 5_000_000_000

OutDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class CheckpointReport:
    """What a merge of checkpoints did.

    Attributes:
        names: The contributions, in order.
        merged: How many tensors were merged.
        copied: How many were copied: integers, equal everywhere.
        size_bytes: Bytes of the tensors written.
        warnings: What was odd about the inputs.
    """

    names: tuple[str, ...]
    merged: int
    copied: int
    size_bytes: int
    warnings: tuple[str, ...]


def merge_checkpoints(
    models: Sequence[Path],
    recipe: Recipe,
    out: Path,
    *,
    base: Path | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    without: Sequence[str] = (),
    dtype: OutDtype | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    device: str | torch.device | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> CheckpointReport:
    """Merge whole models into a new checkpoint: base + scale·merge(model_i − base).

    Memory is the budget and a few pieces, whatever the number and the size of the models: nothing
    is mapped, and the result goes to disk as it is made. Methods on matrices hold one matrix of
    every model, and refuse a budget that is too small for that. The folder appears when it is
    complete.

    Args:
        models: Checkpoints: folders, or safetensors files.
        recipe: Method, parameters and scale; its ``refactor`` is not read.
        out: Folder to write; must not exist, or be empty.
        base: What the models were fine-tuned from. Without it the weights themselves are merged,
            as if the base were zero: for means and for methods on angles.
        weights: Weight per contribution, where no rule of the recipe says otherwise; None takes the
            recipe's, and without any counts each once.
        names: What to call the contributions; None takes their paths.
        without: Names of contributions to leave out, as if they had never been given.
        dtype: What the result is stored in; None keeps the base's, tensor by tensor.
        budget_bytes: Memory for entries.
        device: Where methods that decide entry by entry go through them, as ``cuda``: a chunk at a
            time is moved there. None merges them where they lie. ``budget_bytes`` is its memory.
        shard_bytes: Most bytes of tensors in one file.
        progress: Called with the tensors done and all there are, of this rank.
        ranks: Who merges these checkpoints together, each a part of the tensors and of the budget;
            each writes its own into the files, which are those that one alone would write.

    Raises:
        ValueError: Bad recipe, weights or checkpoints, in one line that names the contribution.
        OSError: The disk refuses.
        LostRankError: Another rank is gone; nothing is left behind.
    """
    check_not_judged(recipe.suspicion, "checkpoints")
    budget_bytes //= ranks.local_count
    paths = [str(path) for path in models] if names is None else names
    stay = remaining(contribution_names(paths, len(models)), without, recipe, weights)
    models = [models[index] for index in stay.indices]
    inputs = open_inputs(models, base, stay.names, named(recipe))
    parts = groups(stay.recipe, inputs.cohort.deltas, len(models))
    warnings = check_groups(parts, replace(inputs.cohort, ranks=ranks), base, budget_bytes)
    of = {module: group for group in parts for module in group.modules}
    like = inputs.like.tensors
    stored = None if dtype is None else getattr(torch, dtype)
    layout = {
        name: (stored if stored and tensor.dtype.is_floating_point else tensor.dtype, tensor.shape)
        for name, tensor in like.items()
    }
    mine = ranks.mine({name: tensor.size_bytes for name, tensor in like.items()})
    cohort = replace(placed(inputs.cohort, parts[0].method, device).only(mine), ranks=ranks)
    done = 0

    def merged_pieces(name: str) -> Iterator[Tensor]:
        nonlocal done
        if name in inputs.cohort.deltas:
            for start, rows_Rn in rows[of[name].modules].rows(name):
                yield _onto_base(inputs, name, start, rows_Rn, of[name].scale, layout[name][0])
        else:
            yield from pieces(like[name])
        done += 1
        if progress is not None:
            progress(done, len(mine))

    with shared_folder(out, ranks) as partial:
        inputs.check_copied(mine)
        rows = {
            group.modules: merged_rows(
                cohort.only(group.modules), group, budget_bytes, alone=len(parts) == 1
            )
            for group in parts
        }
        if ranks.rank == 0:
            lay_out_checkpoint(partial, layout, shard_bytes)
            if inputs.like.folder is not None:
                copy_companions(inputs.like.folder, partial)
                if dtype is not None:
                    _restate_dtype(partial / "config.json", dtype)
        ranks.wait()
        fill_checkpoint(partial, layout, shard_bytes, merged_pieces, mine)
    return CheckpointReport(
        names=inputs.cohort.names,
        merged=len(inputs.cohort.deltas),
        copied=len(inputs.copied),
        size_bytes=sum(kind.itemsize * shape.numel() for kind, shape in layout.values()),
        warnings=(*warnings, *inputs.warnings),
    )


def check_groups(
    parts: Sequence[Group], cohort: Cohort, base: Path | None, budget_bytes: int
) -> list[str]:
    """Refuse what can be told without numbers: methods, a base that is missing, too few of them.

    Returns:
        Warnings, one line each.

    Raises:
        ValueError: One of these, in one line.
    """
    warnings = []
    for group in parts:
        if group.excluded:
            continue
        warnings += _check_method(group.method, base)
        check_count(group, cohort.names)
        check_budget(cohort.only(group.modules), group.method, budget_bytes)
    if base is None and any(group.excluded for group in parts):
        raise ValueError(
            "modules: exclude keeps modules as the base has them; name it with --base, or give "
            "weights that take one of the models"
        )
    return list(dict.fromkeys(warnings))


def _check_method(method: MergeMethod, base: Path | None) -> list[str]:
    """Refuse methods that need factors, or a base that is not given.

    Returns:
        Warnings, one line each.

    Raises:
        ValueError: The method merges factors, or it drops entries or directions and would do so
            with the weights of a model.
    """
    if method.factors:
        raise ValueError(
            f"method: {method.name} works on the factors of adapters, checkpoints have none; "
            "choose another, such as mean or ties"
        )
    if base is None and (method.statistics or method.draws or method.matrices is not None):
        raise ValueError(
            f"method: {method.name} chooses among the entries or directions of task vectors; "
            "name the checkpoint that all were fine-tuned from with --base"
        )
    # A mean is the same from wherever it is taken.
    if base is None and method.name != "mean":
        return [f"no base: {method.name} merges the weights themselves, as if it were zero"]
    return []


def check_count(group: Group, names: Sequence[str]) -> None:
    """Let a group refuse what can be told without numbers, such as too few contributions.

    Where steps go before the method, it is mixtures that it gets too few of.

    Raises:
        ValueError: What the steps say to so many contributions, or the method to one entry of zero
            from each that it sees.
    """
    weights_C = group.weights_C
    if group.pre:
        # Contributions that have nothing in common: no two are the same, and none is longer.
        mix_KC = mixing(group.pre, torch.eye(len(weights_C), dtype=torch.float64))
        weights_C = torch.ones(len(mix_KC), dtype=torch.float64)
        names = [f"mixture {index}" for index in range(len(mix_KC))]
    zeros = torch.zeros(len(weights_C), 1, 1)
    group.method(zeros, weights_C, group.config, names=names)


def _onto_base(
    inputs: Inputs, name: str, start: int, rows_Rn: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """The base + scale·merged [L], in the dtype that is stored.

    Raises:
        ValueError: The sum does not fit the dtype.
    """
    total_L = rows_Rn.flatten() * scale
    if inputs.reference is not None:
        total_L += inputs.reference.entries(name, start * rows_Rn.shape[1], len(total_L))
    stored_L = total_L.to(dtype)
    if not bool(stored_L.isfinite().all()):
        raise ValueError(
            f"scale: {name} leaves the range of {dtype}; lower the scale or the weights, or store "
            "the result in float32"
        )
    return stored_L


def _restate_dtype(path: Path, dtype: OutDtype) -> None:
    """Let a copied config.json say what the weights are stored in."""
    if not path.is_file():
        return
    table = json.loads(path.read_bytes())
    for key in ("dtype", "torch_dtype"):
        if key in table:
            table[key] = dtype
    path.unlink()
    write_text(path, json.dumps(table, indent=2) + "\n")

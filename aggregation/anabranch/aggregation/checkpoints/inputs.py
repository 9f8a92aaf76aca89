"""Checkpoints side by side, once their headers say that they can be merged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from anabranch.aggregation.compatible import check_architectures, check_tokenizers
from anabranch.aggregation.engine.cohort import Cohort, contribution_names, side_by_side
from anabranch.aggregation.engine.importance import with_importance
from anabranch.aggregation.method import MergeMethod
from anabranch.vectors.checkpoint import Checkpoint, Reference, open_checkpoint, stored_vector
from anabranch.vectors.fisher_file import stored_fisher
from anabranch.vectors.safetensors_header import StoredTensor

_PIECE = 1 << 20
"""Entries of a copied tensor held at once."""


@dataclass(frozen=True)
class Inputs:
    """What a merge of checkpoints reads; no tensor has been read yet.

    Attributes:
        models: The contributions.
        base: What they were fine-tuned from; None merges the weights themselves.
        cohort: The contributions' task vectors, left on disk.
        reference: Reads the base; None without one.
        importance_bytes: Bytes of the importance that the method reads.
        copied: Names of integer tensors, which must be equal everywhere and are copied, and of
            those without entries.
        warnings: What is odd about them, one line each.
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    cohort: Cohort
    reference: Reference | None
    importance_bytes: int
    copied: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def like(self) -> Checkpoint:
        """Whose dtypes, configuration and tokenizer the result takes."""
        return self.models[0] if self.base is None else self.base

    def check_copied(self, among: Collection[str]) -> None:
        """Compare the tensors that are copied, of those named.

        Raises:
            ValueError: One differs.
        """
        for name in self.copied:
            if name not in among:
                continue
            for label, model in zip(self.cohort.names, self.models, strict=True):
                pairs = zip(
                    pieces(self.like.tensors[name]), pieces(model.tensors[name]), strict=True
                )
                if not all(torch.equal(one, other) for one, other in pairs):
                    raise ValueError(
                        f"{label}: {name} holds {model.tensors[name].dtype} and differs from "
                        f"{self.like.path}; only floating-point weights can be merged, leave it out"
                    )


def open_inputs(
    models: Sequence[Path],
    base: Path | None,
    names: Sequence[str] | None,
    method: MergeMethod,
) -> Inputs:
    """Read headers and configurations, and compare them.

    Args:
        models: Checkpoint folders or files.
        base: The checkpoint they were fine-tuned from, if there is one.
        names: What to call the models; None takes their paths.
        method: What will merge them; it may ask for their Fisher.

    Raises:
        ValueError: One line that names the model, the tensor or key, and the fix.
    """
    if not models:
        raise ValueError("nothing to merge: give at least one checkpoint")
    names = contribution_names(
        [str(path) for path in models] if names is None else names, len(models)
    )
    opened = tuple(open_checkpoint(path) for path in models)
    origin = None if base is None else open_checkpoint(base)
    labelled = list(zip(names, opened, strict=True))
    if origin is not None:
        labelled.insert(0, (f"the base {base}", origin))
    folders = [(label, checkpoint.folder) for label, checkpoint in labelled]
    warnings = [*check_architectures(folders), *check_tokenizers(folders)]
    _check_tensors(labelled)
    like = labelled[0][1].tensors
    floating = [
        name
        for name, tensor in like.items()
        if tensor.dtype.is_floating_point and tensor.shape.numel()
    ]
    if not floating:
        raise ValueError(f"{labelled[0][1].path}: holds no floating-point tensors to merge")
    reference = None if origin is None else Reference(origin.tensors)
    vectors = [stored_vector(model, floating, reference) for model in opened]
    cohort, importance_bytes = side_by_side(vectors, names), 0
    if method.needs_importance:
        read = [stored_fisher(m.folder) if m.folder else ({}, 0) for m in opened]
        importance_bytes = sum(size_bytes for _, size_bytes in read)
        weighed = [replace(v, importance=f) for v, (f, _) in zip(vectors, read, strict=True)]
        cohort = with_importance(cohort, weighed, method)
    return Inputs(
        opened,
        origin,
        cohort,
        reference,
        importance_bytes,
        tuple(name for name in like if name not in set(floating)),
        tuple(warnings),
    )


def _check_tensors(labelled: Sequence[tuple[str, Checkpoint]]) -> None:
    """Every checkpoint holds the tensors of the first, in its shapes."""
    whose, first = labelled[0]
    for label, model in labelled[1:]:
        missing = sorted(first.tensors.keys() - model.tensors.keys())
        extra = sorted(model.tensors.keys() - first.tensors.keys())
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}"
            more = len(missing) + len(extra) - 1
            raise ValueError(
                f"{label}: {what}{f' (and {more} more)' if more else ''}, unlike {whose}; "
                "save both as the same class of model, tied weights alike"
            )
        for name, tensor in first.tensors.items():
            _check_alike(label, whose, model.tensors[name], tensor)


def _check_alike(label: str, whose: str, mine: StoredTensor, theirs: StoredTensor) -> None:
    if mine.shape != theirs.shape:
        raise ValueError(
            f"{label}: {mine.name} has shape {tuple(mine.shape)}, in {whose} it has "
            f"{tuple(theirs.shape)}; merge fine-tunes of one base, of one vocabulary"
        )
    if mine.dtype != theirs.dtype and not (
        mine.dtype.is_floating_point and theirs.dtype.is_floating_point
    ):
        raise ValueError(
            f"{label}: {mine.name} holds {mine.dtype}, in {whose} {theirs.dtype}; "
            "save both in floating point"
        )


def pieces(tensor: StoredTensor) -> Iterator[Tensor]:
    """A tensor's entries as they are stored, a bounded piece at a time."""
    entries = tensor.shape.numel()
    for first in range(0, entries, _PIECE):
        yield tensor.entries(first, min(_PIECE, entries - first))

"""Task vectors side by side, once it is known that they can be merged.

Shape legend: m rows, n columns of a module, k inner rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from anabranch.aggregation.finite import check_finite, check_floating, largest
from anabranch.aggregation.ranks import ALONE, Ranks
from anabranch.vectors.task_vector import Delta, Held, LowRank, Streamed, TaskVector


@dataclass(frozen=True)
class Cohort:
    """C contributions over the same modules. Built by ``gather``, which checks them.

    Attributes:
        names: What to call each contribution in messages.
        deltas: By module, in sorted order: one change per contribution, factors in fp32.
        base_hash: Hash of the base they belong to, None when none of them says.
        importances: By module, how much each entry matters to its contribution, where the method
            reads it (``engine.importance``).
        device: Where chunks of entries are merged; None where the first contribution lies.
        ranks: Who merges them together; the modules are then those of this rank.
    """

    names: tuple[str, ...]
    deltas: Mapping[str, tuple[Delta, ...]]
    base_hash: str | None
    importances: Mapping[str, tuple[Delta, ...]] = field(default_factory=dict)
    device: torch.device | None = None
    ranks: Ranks = ALONE

    def __len__(self) -> int:
        """C."""
        return len(self.names)

    @property
    def held_per_entry(self) -> int:
        """Numbers held of each entry: C changes, and as many importances where they are read."""
        return len(self) * (2 if self.importances else 1)

    def only(self, modules: Sequence[str]) -> Cohort:
        """The same contributions over those of some modules that are here."""
        return replace(
            self,
            deltas={module: self.deltas[module] for module in modules if module in self.deltas},
            importances={m: self.importances[m] for m in modules if m in self.importances},
        )

    def share_of(self, ranks: Ranks) -> Cohort:
        """The same contributions over the modules that one of several ranks merges."""
        sizes = {module: parts[0].shape.numel() for module, parts in self.deltas.items()}
        return replace(self.only(ranks.mine(sizes)), ranks=ranks)

    def entries(self) -> int:
        """Entries of one whole task vector, D over all modules."""
        return sum(parts[0].shape.numel() for parts in self.deltas.values())


def gather(
    vectors: Sequence[TaskVector],
    names: Sequence[str] | None = None,
    dense_later: bool = False,
) -> Cohort:
    """Check that task vectors can be merged, and set them side by side.

    Args:
        vectors: One task vector per contribution.
        names: What to call each in messages; None numbers them from 0.
        dense_later: Leaves it to ``check_dense`` whether dense entries are finite: that is a read
            of all of them, which a sum of them makes needless.

    Raises:
        ValueError: As ``side_by_side``, or a number that is not finite. Names the contribution and
            the module.
    """
    return checked(side_by_side(vectors, names), dense_later)


def checked(cohort: Cohort, dense_later: bool = False) -> Cohort:
    """A cohort whose numbers are known to be finite, with factors in fp32; see ``gather``."""
    deltas = {}
    for module, parts in cohort.deltas.items():
        for name, delta in zip(cohort.names, parts, strict=True):
            of = f"{name}: module {module}"
            check_floating(delta, of)
            if isinstance(delta, LowRank) or not dense_later:
                check_finite(delta, of)
        deltas[module] = tuple(map(_wide, parts))
    return replace(cohort, deltas=deltas)


def side_by_side(vectors: Sequence[TaskVector], names: Sequence[str] | None = None) -> Cohort:
    """Task vectors of the same modules and shapes; no number is looked at.

    Args:
        vectors: One task vector per contribution.
        names: What to call each in messages; None numbers them from 0.

    Raises:
        ValueError: No contribution; names that do not pair up; different bases, modules or shapes.
            Names the contribution and the module.
    """
    if not vectors:
        raise ValueError("nothing to merge: give at least one contribution")
    names = contribution_names(names, len(vectors))
    first = vectors[0]
    for name, vector in zip(names, vectors, strict=True):
        if vector.names() != first.names():
            odd = ", ".join(sorted(set(vector.names()) ^ set(first.names()))[:3])
            raise ValueError(
                f"{name} and {names[0]} change different modules, such as {odd}; "
                "merge contributions that train the same modules"
            )
    deltas: dict[str, tuple[Delta, ...]] = {}
    for module in first.names():
        parts = []
        for name, vector in zip(names, vectors, strict=True):
            delta = vector.deltas[module]
            shape, expected = delta.shape, first.deltas[module].shape
            if shape != expected:
                raise ValueError(
                    f"{name}: module {module} has shape {tuple(shape)}, "
                    f"in {names[0]} it has {tuple(expected)}; they belong to different bases"
                )
            parts.append(delta)
        deltas[module] = tuple(parts)
    return Cohort(names, deltas, common_base([v.base_hash for v in vectors], names))


def check_dense(cohort: Cohort, module: str, coefficients: Sequence[float], merged: Held) -> None:
    """Refuse dense entries that are not finite, which the sum of them shows.

    Args:
        cohort: The contributions, gathered with ``dense_later``.
        module: Which module.
        coefficients: c_i per contribution; one without a say does not show, and is read.
        merged: Σ c_i ΔW_i.

    Raises:
        ValueError: Some are not; names the contribution.
    """
    fine = isinstance(merged, LowRank) or largest(merged) <= torch.finfo(torch.float32).max
    deltas = cohort.deltas[module]
    for name, delta, coefficient in zip(cohort.names, deltas, coefficients, strict=True):
        if not (fine and coefficient):
            check_finite(delta, f"{name}: module {module}")


def contribution_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """What to call each contribution in messages: as given, or numbered from 0.

    Raises:
        ValueError: Not one name for each.
    """
    if names is None:
        return tuple(f"contribution {index}" for index in range(count))
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} contributions; give one for each")
    return tuple(names)


def common_base(hashes: Sequence[str | None], names: Sequence[str]) -> str | None:
    """The one base hash, None when nobody states one.

    Raises:
        ValueError: Two state different ones.
    """
    stated = [(name, value) for name, value in zip(names, hashes, strict=True) if value is not None]
    for name, value in stated:
        if value != stated[0][1]:
            raise ValueError(
                f"{name} was trained on base {value[:12]}, {stated[0][0]} on {stated[0][1][:12]}; "
                "merge contributions to one base"
            )
    return stated[0][1] if stated else None


def _wide(delta: Delta) -> Delta:
    """Factors in fp32, once and not per chunk; other entries stay as they came."""
    if isinstance(delta, LowRank):
        return LowRank(delta.b_mk.detach().float(), delta.a_kn.detach().float())
    return delta if isinstance(delta, Streamed) else delta.detach()

"""What a plan says of groups of modules."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.aggregation.engine.groups import Group
from anabranch.aggregation.method import Scope
from anabranch.aggregation.planning.merge_plan import PlannedGroup

_SCOPES: tuple[Scope, ...] = ("entry", "tensor", "model")


def planned(parts: Sequence[Group]) -> tuple[PlannedGroup, ...]:
    """The groups of a merge in plain words and numbers."""
    return tuple(
        PlannedGroup(
            modules=len(group.modules),
            first=group.modules[0],
            params=group.config.model_dump(mode="json"),
            weights=tuple(group.weights_C.tolist()),
            scale=group.scale,
            excluded=group.excluded,
        )
        for group in parts
    )


def widest_scope(parts: Sequence[Group]) -> Scope:
    """What a merge must see at most before it can decide an entry."""
    return max((group.method.scope_of(group.config) for group in parts), key=_SCOPES.index)

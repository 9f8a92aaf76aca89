"""Admission: whether one reply may take part in a round. Every refusal has a code and a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, MetricRecord
from torch import Tensor

from anabranch.vectors import Adapter
from anabranch.wire import WireError, decode_update
from anabranch.wire.plan import (
    CLIENT_KEY,
    METRICS_KEY,
    UPDATE_KEY,
    UPDATE_STYPE,
    RoundPlan,
)


class RefusedError(ValueError):
    """A reply that is not admitted.

    Attributes:
        code: Short reason for machines.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Candidate:
    """A reply that passed every check but uniqueness.

    Attributes:
        client: The name it gives itself.
        blob: The encoded update.
        metrics: The finite numbers it claims.
    """

    client: str
    blob: bytes
    metrics: Mapping[str, float]


def layout_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels: the bound on everything a reply may hold."""
    return {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}


def claimed_name(message: Message, known: Mapping[int, str]) -> str:
    """The client a message is from: as it was met, or its node number."""
    node = message.metadata.src_node_id
    return known.get(node, f"node-{node}")


def finite_metrics(record: MetricRecord | None) -> dict[str, float]:
    """A reply's scalar metrics, less what is not a finite number."""
    if record is None:
        return {}
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def examine(
    message: Message,
    plan: RoundPlan,
    layout: Mapping[str, tuple[int, ...]],
    client: str,
    max_norm: float | None = None,
) -> Candidate:
    """Check one reply: form, bounds, round, base, start, finiteness, norm.

    Args:
        message: The reply as it arrived; nothing in it is trusted.
        plan: What was asked for.
        layout: Names and shapes the update must have.
        client: The name its node was met under.
        max_norm: Largest ‖update‖₂ admitted; None sets no cap.

    Raises:
        RefusedError: With the first reason found.
    """
    if message.has_error():
        raise RefusedError("client-error", message.error.reason or f"code {message.error.code}")
    content = message.content
    record = content.array_records.get(UPDATE_KEY)
    if record is None or list(record) != [UPDATE_KEY]:
        raise RefusedError("no-update", "the reply holds no update record")
    array = record[UPDATE_KEY]
    if array.stype != UPDATE_STYPE:
        raise RefusedError("wrong-format", f"the update came as {array.stype[:60]!r}")
    named = content.config_records.get(CLIENT_KEY)
    if named is None or named.get(CLIENT_KEY) != client:
        raise RefusedError("wrong-client", f"the reply does not call itself {client!r}")
    try:
        meta, tensors = decode_update(array.data, layout)
    except WireError as error:
        raise RefusedError(error.code, str(error)) from error
    asked = {
        "federation": plan.federation,
        "run": plan.run,
        "round": plan.round,
        "base_hash": plan.base_hash,
        "start_hash": plan.start_hash,
        "client": client,
        "kind": "update",
    }
    for field, wanted in asked.items():
        got = getattr(meta, field)
        if got != wanted:
            code = f"wrong-{field.replace('_', '-')}"
            raise RefusedError(code, f"{field} is {str(got)[:60]!r}, asked for {wanted!r}")
    if max_norm is not None and (norm := update_norm(tensors)) > max_norm:
        raise RefusedError("norm", f"the update's norm {norm:.3g} is over the cap {max_norm:.3g}")
    return Candidate(client, array.data, finite_metrics(content.metric_records.get(METRICS_KEY)))


def update_norm(tensors: Mapping[str, Tensor]) -> float:
    """‖·‖₂ over all tensors, accumulated in fp64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))

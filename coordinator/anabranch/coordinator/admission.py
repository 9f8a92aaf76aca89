"""Admission: what of a reply may be believed. Every refusal has a code and a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from torch import Tensor

from anabranch.coordinator.start import Start
from anabranch.coordinator.trust import Trust
from anabranch.vectors import Adapter
from anabranch.vectors.adapter import A_SUFFIX, B_SUFFIX, Trained
from anabranch.vectors.importance import COLUMNS_SUFFIX, ROWS_SUFFIX, importance_layout
from anabranch.wire import Manifest, UpdateMeta, WireError, decode_forms
from anabranch.wire.codecs.codec import Form
from anabranch.wire.codecs.registry import codec_for
from anabranch.wire.config import CodecConfig
from anabranch.wire.limits import limits_for
from anabranch.wire.plan import (
    CLIENT_KEY,
    METRICS_KEY,
    UPDATE_KEY,
    UPDATE_STYPE,
    RoundPlan,
)
from anabranch.wire.sealing import SEAL_BYTES, SEALED_STYPE

TRAIN_METRICS = ("num-examples", "train-loss", "train-seconds", "encode-seconds")
"""What a client may claim of its training."""
SCORES = ("num-examples", "accuracy", "loss", "evaluate-seconds")
"""What a client may claim of an evaluation."""
LARGEST = 1e12
"""No metric beyond this is kept; accuracy lies in [0, 1]."""


class RefusedError(ValueError):
    """A reply that is not admitted.

    Attributes:
        code: Short reason for machines.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Examined:
    """A reply that passed every check but uniqueness.

    Attributes:
        client: The name its node was met under.
        blob: The encoded update, opened if it was sealed.
        size_bytes: Bytes in which it came.
        meta: What it says of itself.
        changes: The same decoded, each tensor in its codec's form.
        importance: How much it says its entries matter, in the flat layout of
            ``vectors.importance``; empty where the plan did not ask.
        metrics: What it claims, as far as it can be true.
    """

    client: str
    blob: bytes
    size_bytes: int
    meta: UpdateMeta
    changes: Mapping[str, Form]
    importance: Mapping[str, Tensor]
    metrics: Mapping[str, float]


def layout_of(adapter: Adapter, trained: Trained) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what travels: the bound on everything a reply may hold."""
    return {name: tuple(tensor.shape) for name, tensor in adapter.tensors(trained).items()}


def layouts(
    start: Adapter, plan: RoundPlan
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of a round's updates: what travels, and its importance where the plan asks for it."""
    importance = importance_layout(start, plan.trained) if plan.importance else {}
    return layout_of(start, plan.trained), importance


def claims(record: object, names: tuple[str, ...]) -> dict[str, float]:
    """The named scalars of a reply's metrics, less what cannot be true; nothing else is kept."""
    found: dict[str, float] = {}
    for name in names:
        value = record.get(name) if isinstance(record, MetricRecord | dict) else None
        if isinstance(value, int | float) and math.isfinite(value):
            most = 1.0 if name == "accuracy" else LARGEST
            least = -LARGEST if name == "train-loss" else 0.0
            if least <= value <= most:
                found[name] = float(value)
    return found


def examine(
    message: Message,
    start: Start,
    client: str,
    max_norm: float | None = None,
    trust: Trust | None = None,
) -> Examined:
    """Check one reply: form, signature, round, base, start, bounds, size of what it would make.

    Args:
        message: The reply as it arrived; nothing in it is trusted.
        start: What the client was handed: says what was asked for, and gives the layout the update
            must have.
        client: The name its node was met under.
        max_norm: Largest ‖update‖₂ admitted; None sets no cap.
        trust: Says who may sign; None takes unsigned updates.

    Raises:
        RefusedError: With the first reason found.
    """
    # Flower's typed views of a content copy all of it on each access.
    content = message.content
    record, named = content.get(UPDATE_KEY), content.get(CLIENT_KEY)
    if not isinstance(record, ArrayRecord) or list(record) != [UPDATE_KEY]:
        raise RefusedError("no-update", "the reply holds no update record")
    array = record[UPDATE_KEY]
    asked = SEALED_STYPE if trust and trust.seal(start.plan.round) else UPDATE_STYPE
    if array.stype != asked:
        raise RefusedError(
            "wrong-format", f"the update came as {array.stype[:60]!r}, asked for {asked!r}"
        )
    if not isinstance(named, ConfigRecord) or named.get(CLIENT_KEY) != client:
        raise RefusedError("wrong-client", f"the reply does not call itself {client!r}")
    metrics = claims(content.get(METRICS_KEY), TRAIN_METRICS)
    return examine_update(array.data, start, client, metrics, max_norm, trust)


def most_bytes(start: Start, sealed: bool) -> int:
    """Bytes that no honest update of a round is longer than, however it came."""
    most = limits_for(*layouts(start.adapter, start.plan)).message_bytes
    if (budget := start.plan.codec.budget_bytes) is not None:
        most = min(most, budget)
    return most + (SEAL_BYTES if sealed else 0)


def examine_update(
    data: bytes,
    start: Start,
    client: str,
    metrics: Mapping[str, float],
    max_norm: float | None = None,
    trust: Trust | None = None,
) -> Examined:
    """Check an update's bytes, by whichever way they came; arguments as of ``examine``.

    Args:
        data: The bytes, sealed where the round's plan says so.
        start: What the client was handed.
        client: The name it is known under.
        metrics: What it claims of its training.
        max_norm: Largest ‖update‖₂ admitted; None sets no cap.
        trust: Says who may sign; None takes unsigned updates.

    Raises:
        RefusedError: With the first reason found.
    """
    plan = start.plan
    seal = trust.seal(plan.round) if trust else None

    def check(manifest: Manifest) -> None:
        if trust is not None:
            trust.signed_by(manifest, client)
        _refuse_unasked(manifest.meta, plan, client)
        _refuse_other_codec(manifest, plan.codec)
        if trust is not None:
            trust.fresh(manifest.meta)

    expected = layouts(start.adapter, plan)
    try:
        blob = seal.open(data, limits_for(*expected).message_bytes) if seal else data
        meta, changes, importance = decode_forms(blob, *expected, check)
    except WireError as error:
        raise RefusedError(error.code, str(error)) from error
    norms = {name: change.norm() for name, change in changes.items()}
    if max_norm is not None and (norm := math.hypot(*norms.values())) > max_norm:
        raise RefusedError("norm", f"the update's norm {norm:.3g} is over the cap {max_norm:.3g}")
    _refuse_overflow(start, norms)
    _refuse_importance(start.adapter, importance)
    return Examined(client, blob, len(data), meta, changes, importance, metrics)


def _refuse_unasked(meta: UpdateMeta, plan: RoundPlan, client: str) -> None:
    """Refuse an update that was made for something else than the plan."""
    if meta.round < plan.round:
        raise RefusedError("stale-round", f"it was made in round {meta.round}, now {plan.round}")
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


def _refuse_other_codec(manifest: Manifest, codec: CodecConfig) -> None:
    """Refuse an update that was encoded otherwise, or keeps more, than the plan asks."""
    if manifest.codec != codec_for(codec).name:
        asked = codec_for(codec).name
        raise RefusedError(
            "wrong-codec", f"it came as {manifest.codec[:60]!r}, asked for {asked!r}"
        )
    if codec.budget_bytes is not None:
        if manifest.size_bytes > codec.budget_bytes:
            raise RefusedError(
                "over-budget", f"it has {manifest.size_bytes} bytes, the budget is {codec.budget}"
            )
        return
    for row in (row for frame in manifest.frames for row in frame.tensors):
        most = max(1, round(codec.density * row.entries))
        if row.nonzeros is not None and row.nonzeros > most:
            raise RefusedError(
                "over-density", f"{row.name[:100]} keeps {row.nonzeros} entries, asked for {most}"
            )


def _refuse_overflow(start: Start, changes: Mapping[str, float]) -> None:
    """Refuse an update whose ΔW, or the square of its norm, might not be a finite fp32 number.

    Finite factors can have a product that is not: it would make the merge fail for everybody. The
    norms of start and change bound that of their sum, so nothing is made dense here.
    """
    most = {name: norm + changes.get(name, 0.0) for name, norm in start.norms.items()}
    root = math.sqrt(torch.finfo(torch.float32).max)
    for name, factors in start.adapter.lora.items():
        size = most[name + A_SUFFIX] * most[name + B_SUFFIX] * factors.scaling
        if not size < root:
            raise RefusedError("overflow", f"module {name[:100]} might get a norm of {size:.3g}")
    for name in start.adapter.dense:
        if not most[name] < root:
            raise RefusedError("overflow", f"parameter {name[:100]} might be beyond fp32's range")


def _refuse_importance(start: Adapter, importance: Mapping[str, Tensor]) -> None:
    """Refuse a column and a row whose product leaves fp32: each may fit and the two not."""
    for name in start.lora:
        if name + ROWS_SUFFIX in importance:
            sides = (importance[name + suffix] for suffix in (ROWS_SUFFIX, COLUMNS_SUFFIX))
            largest = math.prod(float(side.max()) for side in sides)
            if not largest <= torch.finfo(torch.float32).max:
                raise RefusedError(
                    "importance", f"module {name[:100]} would have importance up to {largest:.3g}"
                )

"""What every message passes on its way into and out of the task: check the base, compress."""

from __future__ import annotations

import secrets
import time

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
)
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from anabranch.client.kept import Kept, state_of
from anabranch.client.order import plan_of
from anabranch.client.records import as_array, pack, record_of, unpack
from anabranch.client.secure import mask
from anabranch.client.session import session_of
from anabranch.client.site import site_of
from anabranch.client.trust import keys_of
from anabranch.wire import UpdateMeta, encode_update
from anabranch.wire.feedback import compensate, remainder
from anabranch.wire.plan import (
    CLIENT_KEY,
    IMPORTANCE_KEY,
    METRICS_KEY,
    SECURE_STYPE,
    UPDATE_KEY,
    UPDATE_STYPE,
    RoundPlan,
)

BASE_MISMATCH = 1001
"""``Error.code`` of a reply: this node holds another base than the plan names."""

RESIDUAL_KEY = "anabranch.residual"
OWED_KEY = "anabranch.residual-before"
RESIDUAL_OF_KEY = "anabranch.residual-of"


def verify_base(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Refuse to train on another base than the plan's, before anything is spent."""
    if message.metadata.message_type in (MessageType.TRAIN, MessageType.EVALUATE):
        mine = session_of(context.run_config, context.node_config).base_hash
        theirs = plan_of(message).base_hash
        if mine != theirs:
            reason = f"base mismatch: this node holds {mine[:12]}, the plan names {theirs[:12]}"
            return Message(Error(BASE_MISMATCH, reason), reply_to=message)
    return call_next(message, context)


def compress(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Encode the trained difference; what the codec dropped is kept for the next round.

    Error feedback lives in ``context.state``. A SuperNode that restarts loses it; a change of base
    or run, or more than ``codec.feedback_gap`` rounds missed, starts it from zero. When the start
    has not moved since this client's last update (the round was abandoned), training makes the
    same change again: the residual is then the one from before that update, or the change would
    count twice.
    """
    reply = call_next(message, context)
    if message.metadata.message_type != MessageType.TRAIN or reply.has_error():
        return reply
    plan, site = plan_of(message), site_of(context.node_config)
    started = time.perf_counter()
    trained = record_of(reply.content, UPDATE_KEY, ArrayRecord)
    metrics = record_of(reply.content, METRICS_KEY, MetricRecord)
    assert trained is not None
    assert metrics is not None
    delta = unpack(trained)
    owed = _residual(context, plan)
    left = unpack(owed)
    wanted = compensate(delta, _due(left, delta), plan.codec.feedback)
    stype = UPDATE_STYPE if plan.secure is None else SECURE_STYPE
    if plan.secure is None:
        blob, sent = _encode(reply, context, plan, wanted, int(metrics["num-examples"]))  # type: ignore[arg-type]
    else:
        blob, sent = mask(message, context, plan, wanted)
    if plan.codec.feedback:
        _keep_residual(context, plan, owed, {**left, **remainder(wanted, sent)})
    state = state_of(context.node_config)
    if state is not None and plan.secure is None:
        state.keep(plan, Kept(blob, _scalars(metrics)))
    reply.content[UPDATE_KEY] = ArrayRecord({UPDATE_KEY: as_array(blob, stype, plan)})
    reply.content[CLIENT_KEY] = ConfigRecord({CLIENT_KEY: site.name})
    metrics["encode-seconds"] = time.perf_counter() - started
    return reply


def _encode(
    reply: Message, context: Context, plan: RoundPlan, wanted: dict[str, Tensor], examples: int
) -> tuple[bytes, dict[str, Tensor]]:
    """The update as a message, signed where the node has keys, and what its receiver will read."""
    meta = UpdateMeta(
        kind="update",
        base_hash=plan.base_hash,
        start_hash=plan.start_hash,
        federation=plan.federation,
        run=plan.run,
        round=plan.round,
        client=site_of(context.node_config).name,
        nonce=secrets.token_bytes(16),
        seed=plan.seed,
        examples=examples,
        issued_s=int(time.time()),
    )
    importance = record_of(reply.content, IMPORTANCE_KEY, ArrayRecord)
    if importance is not None:
        del reply.content[IMPORTANCE_KEY]
    keys = keys_of(context.node_config)
    encoded = encode_update(
        wanted,
        meta,
        plan.codec,
        keys.own if keys else None,
        unpack(importance or ArrayRecord()),
    )
    return encoded.blob, encoded.sent


def _scalars(metrics: MetricRecord) -> dict[str, int | float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _residual(context: Context, plan: RoundPlan) -> ArrayRecord:
    """What earlier rounds still owe; empty when there is nothing, or nothing that still fits."""
    _read_residual(context, plan)
    about = record_of(context.state, RESIDUAL_OF_KEY, ConfigRecord)
    if about is None:
        return ArrayRecord()
    same = about["base-hash"] == plan.base_hash and about["run"] == plan.run
    if not same or plan.round - int(about["round"]) > plan.codec.feedback_gap:  # type: ignore[arg-type]
        return ArrayRecord()
    key = OWED_KEY if about["start-hash"] == plan.start_hash else RESIDUAL_KEY
    return record_of(context.state, key, ArrayRecord) or ArrayRecord()


def _due(left: dict[str, Tensor], delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of the residual belongs to this update.

    What is owed of a factor that this round keeps waits for the round that trains it; what was
    owed at another rank is lost.
    """
    return {
        name: left[name]
        if name in left and left[name].shape == change.shape
        else torch.zeros_like(change)
        for name, change in delta.items()
    }


def _keep_residual(
    context: Context, plan: RoundPlan, owed: ArrayRecord, residual: dict[str, Tensor]
) -> None:
    about = {"base-hash": plan.base_hash, "run": plan.run, "start-hash": plan.start_hash}
    context.state[OWED_KEY] = owed
    context.state[RESIDUAL_KEY] = pack(residual)
    context.state[RESIDUAL_OF_KEY] = ConfigRecord({**about, "round": plan.round})
    state = state_of(context.node_config)
    if state is not None:
        kept = {f"{OWED_KEY}/{name}": tensor for name, tensor in unpack(owed).items()}
        kept |= {f"{RESIDUAL_KEY}/{name}": tensor for name, tensor in residual.items()}
        state.keep_residual(plan, kept, {**about, "round": str(plan.round)})


def _read_residual(context: Context, plan: RoundPlan) -> None:
    """Take up what the node's disk holds: it outlives a run, and the SuperNode."""
    state = state_of(context.node_config)
    found = state.residual(plan) if state is not None else None
    if found is None:
        return
    tensors, about = found
    for key in (OWED_KEY, RESIDUAL_KEY):
        own = {
            name.removeprefix(f"{key}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{key}/")
        }
        context.state[key] = pack(own)
    context.state[RESIDUAL_OF_KEY] = ConfigRecord({**about, "round": int(about["round"])})

"""The Flower ClientApp: train and evaluate a LoRA task on this node's data.

The only part a user writes is the task (``anabranch.client.task.LoraTask``), named in the run's or
the node's configuration as ``task = "package.module:Class"``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from anabranch.client.fisher import diagonal_fisher
from anabranch.client.held import held, hold
from anabranch.client.hello import hello
from anabranch.client.lora import read_adapter, training
from anabranch.client.mods import compress, verify_base
from anabranch.client.order import plan_of
from anabranch.client.records import pack, record_of
from anabranch.client.secure import take_part
from anabranch.client.session import Session, session_of
from anabranch.client.site import Site, site_of
from anabranch.client.task import FisherTask, TrainPlan
from anabranch.client.trust import NodeKeys, keys_of, verify_plan
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.importance import flat_importance
from anabranch.vectors.seeding import word_seed
from anabranch.wire import decode_adapter, decode_change, read_manifest
from anabranch.wire.plan import (
    ADAPTER_KEY,
    ADAPTER_STYPE,
    CHANGE_STYPE,
    CLIENT_KEY,
    IMPORTANCE_KEY,
    METRICS_KEY,
    UPDATE_KEY,
    RoundPlan,
)

app = ClientApp(mods=[verify_plan, verify_base, compress])


def client_seed(seed: int, round_number: int, client: str) -> int:
    """A seed of its own for each client and round, the same on every machine."""
    return word_seed(seed, round_number, client)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators for a while: dropout and the like draw from them.

    ``torch.manual_seed`` would also queue a stack trace for every kind of device that is not in
    use, which costs more than a small client's training.
    """
    on_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        yield


def start_of(
    message: Message, plan: RoundPlan, session: Session, keys: NodeKeys | None, context: Context
) -> Adapter:
    """The adapter the round starts from: as it was sent, or what this node holds where it was not.

    Raises:
        ValueError: It is not the adapter the plan names, or not one the coordinator signed.
    """
    if session.start is not None and session.start[0] == plan.start_hash:
        start = session.start[1]
    else:
        start = _received(message, plan, session, keys, context)
        digest = start.hash()
        if digest != plan.start_hash:
            raise ValueError(
                f"round {plan.round} starts from adapter {plan.start_hash[:12]}, "
                f"this node has {digest[:12]}; check that both run the same task and versions"
            )
        session.start = (digest, start)
    if plan.hold:
        hold(context, plan, start)
    return start


def _received(
    message: Message, plan: RoundPlan, session: Session, keys: NodeKeys | None, context: Context
) -> Adapter:
    """The start as the message describes it."""
    record = record_of(message.content, ADAPTER_KEY, ArrayRecord)
    seeded = seeded_start(session.template, plan.seed)
    check = keys.check_adapter if keys else None
    if record is None:
        return held(context, plan, seeded)[1] if plan.hold else seeded
    array = record[ADAPTER_KEY]
    if array.stype == ADAPTER_STYPE:
        return decode_adapter(array.data, seeded, plan.trains, check)
    if array.stype != CHANGE_STYPE:
        raise ValueError(
            f"the adapter came as {array.stype!r}, this client reads {ADAPTER_STYPE!r}"
        )
    digest, mine = held(context, plan, seeded)
    wanted = read_manifest(array.data).meta.start_hash
    if wanted != digest:
        raise ValueError(
            f"the adapter came as a change of {wanted[:12]}, this node holds {digest[:12]}; "
            "the next round will send it whole"
        )
    return decode_change(array.data, mine, plan.trains, check)


app.query()(hello)


@app.train("advertise")
def advertise(message: Message, context: Context) -> Message:
    """Secure aggregation, phase 1: say by which keys this client takes part."""
    return take_part(message, context, "advertise")


@app.train("deal")
def deal(message: Message, context: Context) -> Message:
    """Phase 2: deal shares to the other members. Phase 3 is the order to train."""
    return take_part(message, context, "deal")


@app.train("confirm")
def confirm(message: Message, context: Context) -> Message:
    """Phase 4: sign whose updates are to be in the sum."""
    return take_part(message, context, "confirm")


@app.train("open")
def open_sum(message: Message, context: Context) -> Message:
    """Phase 5: give the shares that open it."""
    return take_part(message, context, "open")


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the round's start; reply with the difference it made (the mods compress it)."""
    plan, site = plan_of(message), site_of(context.node_config)
    session = session_of(context.run_config, context.node_config).at_rank(plan.rank)
    keys = keys_of(context.node_config)
    start = start_of(message, plan, session, keys, context)
    differences, metrics = fit(session, start, plan, site)
    content = RecordDict({UPDATE_KEY: pack(differences), METRICS_KEY: MetricRecord({**metrics})})
    if plan.importance:
        content[IMPORTANCE_KEY] = pack(take_importance(session, site, plan))
    return Message(content, reply_to=message)


def fit(
    session: Session, start: Adapter, plan: RoundPlan, site: Site
) -> tuple[dict[str, Tensor], dict[str, int | float]]:
    """Train from a start on a site's data.

    Args:
        session: The loaded task; its model is left as trained.
        start: The adapter in service, with its frozen ranks.
        plan: The round's.
        site: Whose data, and whose draw of it.

    Returns:
        The differences that training made, by name in fp32, and the task's metrics with
        ``train-seconds``.
    """
    trained = session.load(start)
    order = _order(plan, site)
    started = time.perf_counter()
    with training(session.model, plan.trained), global_seed(order.seed):
        metrics = dict(session.task.train(session.model, site.partition, order))
    metrics["train-seconds"] = time.perf_counter() - started
    before = trained.tensors(plan.trained)
    after = read_adapter(session.model, session.base_hash).tensors(plan.trained)
    return {name: after[name].float() - before[name].float() for name in before}, metrics


def _order(plan: RoundPlan, site: Site) -> TrainPlan:
    """What the round asks of a site's training."""
    seed = client_seed(plan.seed, plan.round, site.name)
    return TrainPlan.model_validate({**plan.train, "seed": seed})


def take_importance(session: Session, site: Site, plan: RoundPlan) -> dict[str, Tensor]:
    """How much each entry of what was trained matters to this client, in the flat layout.

    Raises:
        ValueError: The task cannot tell.
    """
    task = session.task
    if not isinstance(task, FisherTask):
        raise ValueError(
            f"the round asks for a Fisher, and {type(task).__name__} has no method 'logits'; "
            "see anabranch.client.task.FisherTask"
        )
    order = _order(plan, site)
    logits = task.logits(session.model, site.partition, order.fisher_examples, order.seed)
    return flat_importance(diagonal_fisher(session.model, logits, plan.trained, order.seed))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the adapter that was sent on this node's data."""
    plan, site = plan_of(message), site_of(context.node_config)
    session = session_of(context.run_config, context.node_config).at_rank(plan.rank)
    session.load(start_of(message, plan, session, keys_of(context.node_config), context))
    started = time.perf_counter()
    metrics = dict(session.task.evaluate(session.model, site.partition, plan.split))
    seconds = time.perf_counter() - started
    content = RecordDict(
        {
            METRICS_KEY: MetricRecord({**metrics, "evaluate-seconds": seconds}),
            CLIENT_KEY: ConfigRecord({CLIENT_KEY: site.name}),
        }
    )
    return Message(content, reply_to=message)

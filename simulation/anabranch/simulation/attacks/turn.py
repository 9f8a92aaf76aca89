"""One attacking client's round: what it has at hand before it replies.

Shape legend: H honest clients, f colluders, N clients, D entries of an update, tensor by tensor in
the order of their names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from anabranch.aggregation import merge, merge_one_factor
from anabranch.client.app import client_seed, fit, start_of, take_importance
from anabranch.client.order import plan_of
from anabranch.client.records import pack, record_of, unpack
from anabranch.client.session import Session, session_of
from anabranch.client.site import Site, client_name, site_of
from anabranch.client.task import LoraTask, TrainPlan
from anabranch.client.trust import NodeKeys, keys_of
from anabranch.simulation.attackers import Band, Plot
from anabranch.simulation.attacks.attack import View
from anabranch.simulation.attacks.poison import Poison, PoisonableTask
from anabranch.vectors import Adapter
from anabranch.vectors.frozen import split
from anabranch.wire.plan import IMPORTANCE_KEY, METRICS_KEY, UPDATE_KEY, RoundPlan

BEFORE_KEY = "anabranch.attackers.before"
"""The last round's start, in an attacker's state."""

Changes = Mapping[str, Tensor]
"""What an update changes, by tensor."""

Trainer = Callable[[nn.Module, int, TrainPlan], Mapping[str, float]]
"""``train(model, partition, plan) -> metrics``: in place of the task's own training."""

CLAIMED = {"num-examples": 100, "train-loss": 1.0, "train-seconds": 0.0}
"""What attackers claim who did not train."""


@dataclass(frozen=True, eq=False)
class Turn:
    """An attacking client in one round.

    Attributes:
        message: The order.
        context: The node's.
        plot: What all attackers of the run are told.
        band: The client's own.
    """

    message: Message
    context: Context
    plot: Plot
    band: Band

    @cached_property
    def plan(self) -> RoundPlan:
        """The round's."""
        return plan_of(self.message)

    @cached_property
    def site(self) -> Site:
        """Who this client is."""
        return site_of(self.context.node_config)

    @property
    def seat(self) -> int:
        """Its place among its colluders."""
        return self.band.partitions.index(self.site.partition)

    @cached_property
    def keys(self) -> NodeKeys | None:
        """Its own keys, with which it signs whatever it sends."""
        return keys_of(self.context.node_config)

    @cached_property
    def session(self) -> Session:
        """The loaded task, at the rank asked."""
        own = session_of(self.context.run_config, self.context.node_config)
        return own.at_rank(self.plan.rank)

    @cached_property
    def start(self) -> Adapter:
        """The adapter in service."""
        return start_of(self.message, self.plan, self.session, self.keys, self.context)

    @cached_property
    def trained(self) -> Adapter:
        """The part of it that is trained on."""
        return split(self.start, self.session.template)[0]

    @cached_property
    def before(self) -> Changes:
        """The tensors of it that this round trains."""
        return self.trained.tensors(self.plan.trained)

    @property
    def begun(self) -> bool:
        """Whether the band attacks by now."""
        return self.plan.round >= self.band.attackers.from_round

    def fitted(
        self,
        partition: int,
        poison: Poison | None = None,
        by: Trainer | None = None,
        within: AbstractContextManager[None] | None = None,
    ) -> tuple[Changes, Mapping[str, int | float]]:
        """Train as a client would, on its data or on what was made of them.

        Args:
            partition: Whose data.
            poison: What is made of them.
            by: Trains in place of the task, from the same start and by the same plan.
            within: Entered while it trains.

        Returns:
            What it changed, and the metrics.
        """
        session = self.session
        if poison is not None:
            session = replace(session, task=poisoned(session.task, poison))
        if by is not None:
            session = replace(session, task=_Retrained(session.task, by))
        site = Site(client_name(partition), partition)
        with within or nullcontext():
            return fit(session, self.start, self.plan, site)

    def vectors(self, partitions: Sequence[int]) -> Tensor:
        """What clients change by honest training [N, D]; each is trained once in a process."""
        return torch.stack([_TRAINED.get(self, partition) for partition in partitions])

    def view(self) -> View:
        """What the band sees of the round."""
        seen = self.plot.honest if self.band.attackers.sees == "cohort" else self.band.partitions
        bands = self.plot.bands.index(self.band)
        seed = client_seed(self.plan.seed, self.plan.round, f"attackers {bands}")
        return View(
            see_honest=lambda: self.vectors(seen),
            colluders=len(self.band.partitions),
            entries=sum(tensor.numel() for tensor in self.before.values()),
            generator=torch.Generator().manual_seed(seed),
            train_own=lambda: self.vectors(self.band.partitions),
            previous=self.previous,
            rule=self.rule,
            see_aim=lambda: self.calm(self.vectors(seen)),
        )

    @cached_property
    def previous(self) -> Tensor | None:
        """How the last round moved the model [D]; None where this client was not asked in it."""
        record = record_of(self.context.state, BEFORE_KEY, ArrayRecord)
        if record is None:
            return None
        held = unpack(record)
        if {n: t.shape for n, t in held.items()} != {n: t.shape for n, t in self.before.items()}:
            return None
        return flat({name: self.before[name].float() - held[name] for name in held})

    def rule(self, everyone_ND: Tensor) -> Tensor:
        """What the coordinator's recipe makes of updates [N, D]: all ΔW, flat.

        Not the factors, which have more than one form for what the model is.
        """
        start, trained = self.trained, self.plan.trained
        whole = start.tensors()
        ends = [
            start.with_tensors(
                {**whole, **{name: whole[name] + part for name, part in self.cut(one_D).items()}}
            )
            for one_D in everyone_ND
        ]
        recipe = self.plot.recipe
        if trained == "both":
            merged = merge(ends, recipe, start=start).adapter
        else:
            merged = merge_one_factor(ends, recipe, trained, start=start).adapter
        moved = {
            name: factors.delta().dense() - start.lora[name].delta().dense()
            for name, factors in merged.lora.items()
        }
        moved |= {name: part - start.dense[name] for name, part in merged.dense.items()}
        return flat(moved)

    def calm(self, honest_HD: Tensor) -> Tensor:
        """The same where every colluder sends the honest mean: a rule may refuse fewer."""
        mean_fD = honest_HD.mean(dim=0).expand(len(self.band.partitions), -1)
        return self.rule(torch.cat([honest_HD, mean_fD]))

    def cut(self, vector_D: Tensor) -> dict[str, Tensor]:
        """A vector's entries as tensors by name."""
        names = sorted(self.before)
        sizes = [self.before[name].numel() for name in names]
        parts = torch.split(vector_D.float(), sizes)
        return {
            name: part.view(self.before[name].shape)
            for name, part in zip(names, parts, strict=True)
        }

    def reply(self, changes: Changes, metrics: Mapping[str, int | float] | None = None) -> Message:
        """The reply that the client's mods then compress and sign."""
        claimed = MetricRecord({**(CLAIMED if metrics is None else metrics)})
        content = RecordDict({UPDATE_KEY: pack(changes), METRICS_KEY: claimed})
        if self.plan.importance:
            self.session.load(self.start)
            content[IMPORTANCE_KEY] = pack(take_importance(self.session, self.site, self.plan))
        return Message(content, reply_to=self.message)


class _Retrained:
    """A task that is trained in another way, and is otherwise as it was."""

    def __init__(self, task: LoraTask, by: Trainer) -> None:
        self.train = by
        self.load_base, self.lora_config, self.evaluate = (
            task.load_base, task.lora_config, task.evaluate,
        )  # fmt: skip


def flat(changes: Changes) -> Tensor:
    """All entries in the order of the tensors' names [D]."""
    return torch.cat([changes[name].flatten() for name in sorted(changes)])


def poisoned(task: object, poison: Poison) -> PoisonableTask:
    """The task on poisoned data, made once: a text task tokenises once.

    Raises:
        ValueError: The task's data cannot be poisoned.
    """
    if not isinstance(task, PoisonableTask):
        raise ValueError(
            f"{type(task).__name__} has no method 'poisoned', which attacks on data need; "
            "see anabranch.simulation.attacks.poison.PoisonableTask"
        )
    key = (id(task), poison)
    if key not in _POISONED:
        _POISONED[key] = (task, task.poisoned(poison))
    return _POISONED[key][1]


_POISONED: dict[tuple[int, Poison], tuple[PoisonableTask, PoisonableTask]] = {}
"""With the task they were made from, so that no other comes to have its identity."""


class _Trained:
    """What honest training would change, of the round at hand: colluders share it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._of: tuple[object, ...] = ()
        self._held: dict[int, Tensor] = {}

    def get(self, turn: Turn, partition: int) -> Tensor:
        of = (turn.session.task, turn.plan)
        with self._lock:
            if of != self._of:
                self._of, self._held = of, {}
            if partition not in self._held:
                self._held[partition] = flat(turn.fitted(partition)[0])
            return self._held[partition]


_TRAINED = _Trained()

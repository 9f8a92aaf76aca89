"""One round's replies, trained once and kept: every recipe then merges the same ones.

A cohort stands at the same start: an adapter that was trained on everybody's data for a few steps
and then by honest rounds. Honest clients train from it once
per seed, and each attack's colluders once per number of them, by the code of
``anabranch.simulation.attacks`` as a federation runs it: what they see is what a ``Turn`` shows.
Everything is in files, so that a stopped run goes on and a new recipe costs no training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.aggregation import Recipe, merge
from anabranch.client.app import client_seed, fit
from anabranch.client.lora import read_adapter
from anabranch.client.records import pack, record_of, unpack
from anabranch.client.session import Session
from anabranch.client.site import Site, client_name
from anabranch.client.task import TrainPlan
from anabranch.simulation.attackers import Attackers, plot
from anabranch.simulation.attacks.kinds import resolve_kind
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import BEFORE_KEY, Changes, Trainer, Turn
from anabranch.simulation.engine.identity import server_identity
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire.config import CodecConfig
from anabranch.wire.plan import PLAN_KEY, UPDATE_KEY, RoundPlan

MEAN = Recipe(method="mean")


@dataclass(frozen=True)
class Shelf:
    """Named tensors in a folder, a file per set.

    Attributes:
        folder: Of one seed.
    """

    folder: Path

    def get(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under a name, made first where nothing is."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({key: value.contiguous() for key, value in make().items()}, partial)
            partial.replace(path)
        return load_file(path)


@dataclass(frozen=True, eq=False)
class KeptTurn(Turn):
    """An attacking client's round whose training is looked up before it is done.

    Attributes:
        shelf: Where it is kept.
    """

    shelf: Shelf

    def fitted(
        self,
        partition: int,
        poison: Poison | None = None,
        by: Trainer | None = None,
        within: AbstractContextManager[None] | None = None,
    ) -> tuple[Changes, Mapping[str, int | float]]:
        """As a turn's; ordinary training on the same data is done once for all attacks."""
        if by is not None or within is not None:
            return super().fitted(partition, poison, by, within)
        name = f"trained-{partition}"
        if poison is not None:
            name += "-" + hashlib.sha256(poison.model_dump_json().encode()).hexdigest()[:12]
        train = super().fitted
        return self.shelf.get(name, lambda: train(partition, poison)[0]), {}


@dataclass(frozen=True, eq=False)
class Cohort:
    """A seed's clients before the round that is measured.

    Attributes:
        session: The loaded task.
        shelf: Where the seed's training is kept.
        clients: n.
        seed: Of everything.
        pooled: Steps on everybody's data before the first round.
        warm: Honest rounds before the one that is measured.
        warm_train: The clients' training in these.
        train: Their training in the round that is measured.
    """

    session: Session
    shelf: Shelf
    clients: int
    seed: int
    pooled: int
    warm: int
    warm_train: Mapping[str, Any]
    train: Mapping[str, Any]

    def plan(self, number: int, start: Adapter) -> RoundPlan:
        """A round's order."""
        train = self.train if number > self.warm else self.warm_train
        return RoundPlan(
            federation="scoreboard",
            run="one-shot",
            round=number,
            base_hash=self.session.base_hash,
            start_hash=start.hash(),
            seed=self.seed,
            codec=CodecConfig(name="dense", feedback=0.0),
            train=dict(train),
        )

    def start(self, number: int) -> Adapter:
        """The adapter in service before a round: after it, the mean of what all clients trained."""
        drawn = seeded_start(self.session.template, self.seed)
        if number == 1 and not self.pooled:
            return drawn

        def make() -> Mapping[str, Tensor]:
            if number == 1:
                return self._pooled(drawn).tensors()
            before = self.start(number - 1)
            ends = [self.end(before, self._fitted(number - 1, before, p)) for p in self.everybody]
            return merge(ends, MEAN, start=before).adapter.tensors()

        tensors = self.shelf.get(f"start-{number}", make)
        return drawn.with_tensors(tensors)

    @property
    def everybody(self) -> range:
        """Client by number."""
        return range(self.clients)

    @property
    def measured(self) -> int:
        """The round that is measured."""
        return self.warm + 1

    def honest(self, partition: int) -> Changes:
        """What a client changes in that round by honest training."""
        start = self.start(self.measured)
        return self.shelf.get(
            f"trained-{partition}", lambda: self._fitted(self.measured, start, partition)
        )

    def colluding(self, name: str, attackers: Attackers, *, alone: bool = False) -> list[Changes]:
        """What the colluders of an attack send in it, one after the other.

        Args:
            name: Of the attack, in file names.
            attackers: How many they are, and what they do.
            alone: Whether each does the same however many they are.

        Raises:
            ValueError: Kind or parameters are wrong, or so few cannot.
        """
        told = plot((attackers,), self.clients, self.seed, MEAN)
        band = told.bands[0]
        kind, config = resolve_kind(attackers, "attackers.0")
        assert kind.act is not None, "attackers on the codec send what is refused"
        act, start = kind.act, self.start(self.measured)
        # Rounds look the start up here before they read the message for it.
        self.session.start = (start.hash(), start)

        def make(partition: int) -> Mapping[str, Tensor]:
            with server_identity():
                order = self._order(start)
            turn = KeptTurn(order, self._context(partition), told, band, self.shelf)
            # The session is opened already, under whatever name.
            vars(turn)["session"] = self.session
            with server_identity():
                reply = act(turn, config)
            record = record_of(reply.content, UPDATE_KEY, ArrayRecord)
            assert record is not None
            return unpack(record)

        words = f"{attackers.kind} {sorted(attackers.params.items())}"
        words = f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        if not alone:
            words += f"-{len(band.partitions)}"
        return [self.shelf.get(f"{words}-{p}", partial(make, p)) for p in band.partitions]

    def end(self, start: Adapter, changes: Changes) -> Adapter:
        """Where a client that changed so much came to."""
        whole = start.tensors()
        return start.with_tensors({**whole, **{n: whole[n] + part for n, part in changes.items()}})

    def adapters(self, replies: Sequence[Changes]) -> list[Adapter]:
        """Where the clients that sent these came to."""
        start = self.start(self.measured)
        return [self.end(start, changes) for changes in replies]

    def _fitted(self, number: int, start: Adapter, partition: int) -> Changes:
        site = Site(client_name(partition), partition)
        return fit(self.session, start, self.plan(number, start), site)[0]

    def _pooled(self, drawn: Adapter) -> Adapter:
        """An adapter trained on the union of the clients' data."""
        task = self.session.task
        assert isinstance(task, SimulatedTask)
        seed = client_seed(self.seed, 0, "all")
        self.session.load(drawn)
        plan = TrainPlan.model_validate({**self.warm_train, "steps": self.pooled, "seed": seed})
        task.train_all(self.session.model, plan)
        return read_adapter(self.session.model, self.session.base_hash)

    def _order(self, start: Adapter) -> Message:
        plan = self.plan(self.measured, start).model_dump_json()
        content = RecordDict({PLAN_KEY: ConfigRecord({PLAN_KEY: plan})})
        return Message(content, dst_node_id=1, message_type=MessageType.TRAIN)

    def _context(self, partition: int) -> Context:
        """A node's, which was asked in the round before."""
        before = self.start(self.measured - 1) if self.measured > 1 else None
        state = RecordDict() if before is None else RecordDict({BEFORE_KEY: pack(before.tensors())})
        return Context(
            run_id=1, node_id=partition, node_config={"partition-id": partition}, state=state,
            run_config={},
        )  # fmt: skip

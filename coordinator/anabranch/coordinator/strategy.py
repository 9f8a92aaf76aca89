"""The Flower strategy that merges instead of averaging.

One round: plan, collect with quorum and deadline, merge by the recipe, publish, evaluate. A bad
reply is recorded with its reason and left out; it never stops a round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.registry import named
from anabranch.coordinator.admission import RefusedError
from anabranch.coordinator.collect import Closed, Mail, Reply, replies
from anabranch.coordinator.coordination import Coordination
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.gate import Gate
from anabranch.coordinator.in_service import read_in_service
from anabranch.coordinator.merging import check_method
from anabranch.coordinator.orders import Orders
from anabranch.coordinator.privacy.budget import check_account, why_spent
from anabranch.coordinator.roster import Roster
from anabranch.coordinator.rounds.control import Control, Want, heeded
from anabranch.coordinator.rounds.driver import SuspendedError, was_closed
from anabranch.coordinator.rounds.one_round import OneRound, refuse
from anabranch.coordinator.rounds.uploaders import joined
from anabranch.coordinator.scores import mean_metrics, record_score, scored
from anabranch.coordinator.start import adapter_record
from anabranch.coordinator.store import Store, TakenError
from anabranch.coordinator.trust import Trust
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire.plan import RoundPlan

log = logging.getLogger("anabranch.coordinator")


class _EndedError(Exception):
    """Nobody is waited for any more: the operator ends the run."""


class MergeStrategy(Strategy):
    """Run a federation's rounds on Flower and merge what comes back.

    Args:
        config: The federation.
        template: An adapter that gives modules, ranks, dense start values and the base hash.
        store: Where rounds are kept; an interrupted run goes on from what it holds.
        trust: Keys, where the federation is signed.
        gate: Judges merges, where the federation has a gate.

    Raises:
        ValueError: The template names no base, the method cannot merge what is asked, keys are
            missing, or the store's rounds were not private as the configuration is.
    """

    def __init__(
        self,
        config: FederationConfig,
        template: Adapter,
        store: Store,
        trust: Trust | None = None,
        gate: Gate | None = None,
    ) -> None:
        if (config.gate is None) != (gate is None):
            raise ValueError(
                "gate: the configuration has one and nobody judges, or the other way round; "
                "give gate_of(config.gate, folder)"
            )
        if config.signed != (trust is not None):
            raise ValueError(f"signed is {config.signed} in the federation; give trust to match")
        if template.base_hash is None:
            raise ValueError("the start adapter names no base hash; write it with write_adapter")
        method = named(config.recipe)
        merged = config.quorum
        if config.secure is not None:
            merged = config.secure.contributions(config.quorum)
        groups(config.recipe, [*template.lora, *template.dense], merged)
        check_method(config, template, method)
        check_account(config, store)
        self.config = config
        self.store = store
        self.service = read_in_service(store, seeded_start(template, config.seed), config)
        self.roster = Roster(
            config.poll_s,
            lambda node, why: store.note("meet-failed", {"node": node, "reason": why}),
            lambda: joined(store),
            lambda node, name: store.note("met", {"node": str(node), "name": name}),
            {int(row["node"]): row["name"] for row in store.notes("met")},
        )
        orders, control = Orders(config, method), Control(store)
        self._here = Coordination(
            config, method, template.base_hash, store, trust, self.roster, orders, control, gate
        )
        self._deadline_s = config.deadline_s

    @property
    def adapter(self) -> Adapter:
        """The adapter in service."""
        return self.service.adapter

    def summary(self) -> None:
        """Log what will be run."""
        config = self.config
        log.info(
            "federation %s: %d rounds, quorum %d, recipe %s, codec %s",
            config.name, config.rounds, config.quorum, config.recipe.method, config.codec.name,
        )  # fmt: skip

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run every round the store does not hold yet.

        Args:
            grid: Flower's connection to the nodes.
            initial_arrays: Not used: the start is the store's adapter, or the seeded draw.
            num_rounds: Last round; None takes the federation's.
            timeout: Seconds a round waits; None takes the federation's deadline.
            train_config: Further fields of the clients' ``TrainPlan``.
            evaluate_config: Not used.
            evaluate_fn: Called after each round with its number and the adapter's record.

        Returns:
            Flower's result: the adapter in service and the metrics of the rounds run.

        Raises:
            RuntimeError: Too few clients joined.
        """
        self.summary()
        self.store.note("begun", {"rounds": num_rounds or self.config.rounds})
        self._here.control.begin()
        self._deadline_s = timeout or self.config.deadline_s
        mail = Mail(grid, self.config.poll_s)
        result = Result()
        result.arrays = self.arrays
        try:
            self._run(
                grid, mail, result, num_rounds or self.config.rounds, train_config, evaluate_fn
            )
        except SuspendedError:
            log.info("the run stops; what is under way goes on in the next one")
            self.store.note("suspended", {"done": self._done()})
            return result
        for reply in mail.give_up(Closed("closed", "the run ended before it came")):
            client = self._here.orders.client(reply.node, int(reply.group))
            refused = RefusedError(reply.code, reply.reason)
            refuse(self.store, int(reply.group), client, refused)
        heeded(self.store)
        self.store.note("ended", {"adapter_hash": self.service.hash})
        return result

    def _run(
        self,
        grid: Grid,
        mail: Mail,
        result: Result,
        rounds: int,
        train_config: ConfigRecord | None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        """Every round up to the last.

        Raises:
            SuspendedError: It is to end now, and to go on where it is.
        """
        # So many that the sampled share can be a quorum.
        needed = math.ceil(self.config.quorum / self.config.fraction)
        done = self._done()
        # Whoever left since an earlier run is not waited for.
        went_on = bool(self.store.notes("planned"))
        first = needed if went_on else max(self.config.clients, needed)
        self._wait_for(grid, first, done + 1)
        if done:
            self._evaluate(done, mail, grid, result)
        # A round that somebody else ended is over; one whose end was refused for another's receipt
        # is not, and is done again.
        while (server_round := self._done() + 1) <= rounds:
            self._read_again()
            if (reason := self._why_no_more(server_round)) is not None:
                log.warning("round %d is not begun: %s", server_round, reason)
                want = self._here.control.want().value
                facts = {"round": server_round, "reason": reason, "want": want}
                self.store.note("stopped", facts)
                break
            # Nodes come and go between rounds: one that cannot reach its quorum is not begun.
            self._wait_for(grid, needed, server_round)
            if self._is_to_end(self._here.control.want(), server_round):
                continue
            under_way = self._begin(server_round, train_config or ConfigRecord())
            orders = under_way.begin(grid, mail.owed())
            arrays, metrics = self._aggregate(under_way, under_way.collect(mail, orders))
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            self.store.tidy()
            if server_round > self._done():
                continue
            self._evaluate(server_round, mail, grid, result)
            if evaluate_fn and (own := evaluate_fn(server_round, self.arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = own

    @property
    def arrays(self) -> ArrayRecord:
        """The adapter in service as it is sent; empty while the seed alone describes it."""
        return adapter_record(self.service.blob)

    def plan(self, server_round: int) -> RoundPlan:
        """What round ``server_round`` asks of a client, from the adapter in service."""
        return self._here.plan(server_round, self.service)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan a round: orders for the sampled clients that have not contributed to it yet.

        Each is sent the adapter in service at its rank; ``arrays`` is not used.
        """
        self._under_way = self._begin(server_round, config)
        return self._under_way.begin(grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit replies, then merge what was admitted; below the quorum nothing changes."""
        answers = (Reply(message.metadata.src_node_id, message) for message in replies)
        return self._aggregate(self._under_way, answers)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every known client that has not done so yet to score the adapter in service."""
        return self._ask_scores(server_round, set())

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record each client's scores; their plain mean is returned."""
        answers = (Reply(message.metadata.src_node_id, message) for message in replies)
        return self._record_scores(server_round, answers)

    def _wait_for(self, grid: Grid, count: int, server_round: int) -> None:
        """Wait for so many clients, beside those whose update a round holds already.

        Raises:
            RuntimeError: They did not come in time.
            SuspendedError: The coordinator is to stop.
        """
        if self._is_to_end(self._here.control.want(), server_round):
            return
        if was_closed(self.store, server_round):
            self.roster.refresh(grid)
            return
        held = {row.client for row in self.store.contributions(server_round)}

        def heed() -> None:
            want = self._here.control.want()
            if want is Want.STOP:
                raise SuspendedError
            if want in (Want.DRAIN, Want.ABORT):
                raise _EndedError

        # What is asked is heeded by whoever asked to wait.
        with suppress(_EndedError):
            self.roster.wait_for(grid, count, self.config.join_timeout_s, held, heed)

    def _done(self) -> int:
        """The last round that is over."""
        latest = self.store.latest()
        over: list[int] = [row["round"] for row in self.store.notes("round")]
        return max([*over, latest.round if latest else 0])

    def _why_no_more(self, server_round: int) -> str | None:
        """Why no further round begins; None when one may. While the operator pauses, it waits."""
        while (want := self._here.control.want()) is Want.PAUSE:
            time.sleep(max(self.config.poll_s, 0.1))
        if want is Want.STOP:
            raise SuspendedError
        if self._is_to_end(want, server_round):
            return f"the operator asked to {want.value}"
        return why_spent(self.config, self.store, server_round)

    def _is_to_end(self, want: Want, server_round: int) -> bool:
        """Whether the operator wants no such round; one that was under way closes, as is asked."""
        if want not in (Want.DRAIN, Want.ABORT):
            return False
        planned = self.store.last_note("planned")
        return planned is None or planned["round"] < server_round

    def _begin(self, server_round: int, train: ConfigRecord) -> OneRound:
        return OneRound(self._here, server_round, self.service, self._deadline_s, dict(train))

    def _ask_scores(self, server_round: int, busy: set[int]) -> list[Message]:
        """Orders to score, but for nodes that are at work: they would answer after that only."""
        every = self.config.evaluate_every
        if not every or server_round % every:
            return []
        without = scored(self.store, server_round)
        asked = {
            node: name
            for node, name in self.roster.nodes().items()
            if name not in without and node not in busy and node >= 0
        }
        whole = self.service.start(self.plan(server_round), self._here.key)
        orders = self._here.orders.evaluate(asked, whole)
        down = self._here.orders.bytes_down
        self.store.note("scoring", {"round": server_round, "bytes_down": down})
        return orders

    def _evaluate(self, server_round: int, mail: Mail, grid: Grid, result: Result) -> None:
        orders = self._ask_scores(server_round, {node for node, _ in mail.owed()})
        incoming = replies(
            grid, orders, deadline_s=self.config.evaluate_deadline_s, poll_s=self.config.poll_s
        )
        scores = self._record_scores(server_round, incoming)
        if scores is not None:
            result.evaluate_metrics_clientapp[server_round] = scores

    def _record_scores(self, server_round: int, incoming: Iterable[Reply]) -> MetricRecord | None:
        rows: list[dict[str, float]] = []
        for reply in incoming:
            self._here.orders.learn(reply, self.service.hash)
            client = self._here.orders.scorer(reply.node) or "unknown"
            found = record_score(self.store, server_round, client, reply)
            if found is not None:
                rows.append(found)
        return mean_metrics(rows)

    def _aggregate(
        self, under_way: OneRound, incoming: Iterable[Reply]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        under_way.admit(incoming)
        try:
            candidate = under_way.finish()
        except TakenError as error:
            log.warning("the round does not end so: %s", error)
            self._read_again()
            return self.arrays, None
        if candidate is None:
            return None, None
        self.service = candidate
        return self.arrays, mean_metrics([row.metrics for row in under_way.counted.own])

    def _read_again(self) -> None:
        """Serve what the store holds, where another adapter was put in service meanwhile."""
        latest = self.store.latest()
        if latest is not None and latest.adapter_hash != self.service.hash:
            self.service = read_in_service(self.store, self.service.seeded, self.config)

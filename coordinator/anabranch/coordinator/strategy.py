"""The Flower strategy that merges instead of averaging.

One round: plan, collect with quorum and deadline, merge by the recipe, publish, evaluate. A bad
reply is recorded with its reason and left out; it never stops a round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from anabranch.aggregation import MergeReport
from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.registry import named
from anabranch.coordinator.admission import RefusedError
from anabranch.coordinator.cohort import Cohort, update_bytes
from anabranch.coordinator.collect import Closed, Mail, Reply, replies
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService, in_service, read_in_service, successor
from anabranch.coordinator.merging import check_method, merge_cohort, merge_privately
from anabranch.coordinator.orders import Orders
from anabranch.coordinator.privacy.budget import (
    check_account,
    next_release,
    spent_with,
    why_spent,
)
from anabranch.coordinator.privacy.ledger import RELEASE_KEY
from anabranch.coordinator.privacy.noise import noise_source
from anabranch.coordinator.receipts import abandoned_receipt, merge_receipt
from anabranch.coordinator.roster import Roster
from anabranch.coordinator.rounds.control import Control, Want
from anabranch.coordinator.rounds.driver import Driver, terms_of, was_closed
from anabranch.coordinator.rounds.machine import Failed, Merged, Passed, State
from anabranch.coordinator.rounds.stragglers import Carried, carried, told
from anabranch.coordinator.scores import mean_metrics, record_score, scored
from anabranch.coordinator.secure.round import SecureRound
from anabranch.coordinator.start import Start, adapter_record
from anabranch.coordinator.store import Contribution, Publication, Refusal, Store, TakenError
from anabranch.coordinator.trust import Trust
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire.errors import one_line
from anabranch.wire.plan import RoundPlan

log = logging.getLogger("anabranch.coordinator")


class MergeStrategy(Strategy):
    """Run a federation's rounds on Flower and merge what comes back.

    Args:
        config: The federation.
        template: An adapter that gives modules, ranks, dense start values and the base hash.
        store: Where rounds are kept; an interrupted run goes on from what it holds.
        trust: Keys, where the federation is signed.

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
    ) -> None:
        if config.signed != (trust is not None):
            raise ValueError(f"signed is {config.signed} in the federation; give trust to match")
        if template.base_hash is None:
            raise ValueError("the start adapter names no base hash; write it with write_adapter")
        self._method = named(config.recipe)
        merged = config.quorum
        if config.secure is not None:
            merged = config.secure.contributions(config.quorum)
        groups(config.recipe, [*template.lora, *template.dense], merged)
        check_method(config, template, self._method)
        check_account(config, store)
        self.config = config
        self.store = store
        self._trust = trust
        self._key = trust.key if trust else None
        self.base_hash = template.base_hash
        self.service = read_in_service(store, seeded_start(template, config.seed), config)
        self.roster = Roster(
            config.poll_s,
            lambda node, why: store.note("meet-failed", {"node": node, "reason": why}),
        )
        self._orders = Orders(config, self._method)
        self._cohort = Cohort(store, trust, config.max_norm)
        self._control = Control(store)
        self._deadline_s = config.deadline_s
        self._secure: SecureRound | None = None

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
        self._control.begin()
        self._deadline_s = timeout or self.config.deadline_s
        mail = Mail(grid, self.config.poll_s)
        result = Result()
        result.arrays = self.arrays
        # So many that the sampled share can be a quorum.
        needed = math.ceil(self.config.quorum / self.config.fraction)
        first = max(self.config.clients, needed)
        self.roster.wait_for(grid, first, self.config.join_timeout_s)
        done = self._done()
        if done:
            self._evaluate(done, grid, result)
        for server_round in range(done + 1, (num_rounds or self.config.rounds) + 1):
            if server_round <= self._done():
                # An earlier adapter was put in service again between two rounds.
                self._read_again()
                continue
            if (reason := self._why_no_more(server_round)) is not None:
                log.warning("round %d is not begun: %s", server_round, reason)
                self.store.note("stopped", {"round": server_round, "reason": reason})
                break
            # Nodes come and go between rounds: one that cannot reach its quorum is not begun.
            self.roster.wait_for(grid, needed, self.config.join_timeout_s)
            orders = self._plan_round(
                server_round, train_config or ConfigRecord(), grid, mail.owed()
            )
            arrays, metrics = self._aggregate(server_round, self._collect(mail, orders))
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            self.store.tidy()
            self._evaluate(server_round, grid, result)
            if evaluate_fn and (own := evaluate_fn(server_round, self.arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = own
        self._close(mail)
        self.store.note("ended", {"adapter_hash": self.service.hash})
        return result

    @property
    def arrays(self) -> ArrayRecord:
        """The adapter in service as it is sent; empty while the seed alone describes it."""
        return adapter_record(self.service.blob)

    def plan(
        self,
        server_round: int,
        train: ConfigRecord | None = None,
        service: InService | None = None,
    ) -> RoundPlan:
        """What round ``server_round`` asks of a client, from the adapter that serves in it."""
        config = self.config
        return RoundPlan(
            federation=config.name,
            run=config.run,
            round=server_round,
            base_hash=self.base_hash,
            start_hash=(service or self.service).hash,
            seed=config.seed,
            codec=config.codec,
            trains=config.trains,
            importance=self._method.needs_importance,
            hold=config.down_codec is not None,
            train={**config.train, **dict(train or {})},
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan a round: orders for the sampled clients that have not contributed to it yet.

        Each is sent the adapter in service at its rank; ``arrays`` is not used.
        """
        return self._plan_round(server_round, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit replies, then merge what was admitted; below the quorum nothing changes."""
        answers = (Reply(message.metadata.src_node_id, message) for message in replies)
        return self._aggregate(server_round, answers)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every known client that has not done so yet to score the adapter in service."""
        every = self.config.evaluate_every
        if not every or server_round % every:
            return []
        done = scored(self.store, server_round)
        asked = {node: name for node, name in self.roster.nodes().items() if name not in done}
        whole = self.service.start(self.plan(server_round), self._key)
        orders = self._orders.evaluate(asked, whole)
        self.store.note("scoring", {"round": server_round, "bytes_down": self._orders.bytes_down})
        return orders

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record each client's scores; their plain mean is returned."""
        answers = (Reply(message.metadata.src_node_id, message) for message in replies)
        return self._record_scores(server_round, answers)

    def _done(self) -> int:
        """The last round that is over."""
        latest = self.store.latest()
        over: list[int] = [row["round"] for row in self.store.notes("round")]
        return max([*over, latest.round if latest else 0])

    def _why_no_more(self, server_round: int) -> str | None:
        """Why no further round begins; None when one may. While the operator pauses, it waits."""
        while (want := self._control.want()) is Want.PAUSE:
            time.sleep(max(self.config.poll_s, 0.1))
        if want is not Want.RUN:
            return f"the operator asked to {want.value}"
        return why_spent(self.config, self.store, server_round)

    def _plan_round(
        self,
        server_round: int,
        train: ConfigRecord,
        grid: Grid,
        owed: Sequence[tuple[int, str]] = (),
    ) -> list[Message]:
        """Begin a round; ``owed`` are nodes whose reply is still to come, and since which round."""
        plan = self.plan(server_round, train)
        if self._trust is not None:
            plan = self._trust.begin_round(plan)
        late = {int(group) for _, group in owed}
        self._orders.begin(self.service.start(plan, self._key), late)
        self._cohort = Cohort(self.store, self._trust, self.config.max_norm)
        terms = terms_of(self.config, self._deadline_s)
        self._round = Driver(server_round, terms, self.store, self._control)
        done = {row.client for row in self.store.contributions(server_round)}
        asked = self._to_ask(server_round, done, {node for node, _ in owed})
        self.store.note(
            "planned",
            {
                "round": server_round,
                "asked": sorted(asked.values()),
                "start_hash": plan.start_hash,
            },
        )
        if self.config.secure is None:
            self._round.asked(len(asked), len(done) + len(self._carried(server_round)))
            return self._orders.train(asked)
        assert self._trust is not None
        self._secure = SecureRound(
            self.config, self.config.secure, self._orders.whole, self.store, self._trust, grid
        )
        ready = self._secure.begin(asked)
        self._orders.part(self._secure.starts)
        self._round.asked(len(ready), self._secure.summed())
        return [self._secure.deliver(order) for order in self._orders.train(ready)]

    def _to_ask(self, server_round: int, done: set[str], busy: set[int]) -> dict[int, str]:
        """Nodes and clients to ask in a round, beside those that contributed, or are at work."""
        # Sums that were opened before an interruption are all there will be.
        settled = bool(done) if self.config.secure else was_closed(self.store, server_round)
        if settled:
            return {}
        count = self.config.asked(len(self.roster.nodes()))
        sampled = self.roster.sample(count, f"{self.config.seed}/{server_round}")
        asked = {
            node: name for node, name in sampled.items() if name not in done and node not in busy
        }
        if self.config.privacy is None:
            return asked
        # Others may be there than when the round began, and what is divided by stays.
        return dict(list(asked.items())[: max(0, count - len(done))])

    def _collect(self, mail: Mail, orders: Sequence[Message]) -> Iterator[Reply]:
        """The replies that the round under way takes, and one for each that it gives up."""
        yield from mail.send(orders)
        yield from mail.arrivals(self._round.closed)
        closed = self._round.closed()
        assert closed is not None  # every order has its reply
        yield from mail.give_up(closed, self._is_too_late)

    def _is_too_late(self, group: str) -> bool:
        """Whether an update of a round will not be merged any more."""
        policy = self.config.collect
        since = sum(row.round >= int(group) for row in self.store.publications())
        return policy.stragglers == "drop" or since > policy.max_staleness

    def _close(self, mail: Mail) -> None:
        """Give up what no round is left for."""
        for reply in mail.give_up(Closed("closed", "the run ended before it came")):
            client = self._orders.client(reply.node, int(reply.group)) or "unknown"
            self._refuse(int(reply.group), client, RefusedError(reply.code, reply.reason))

    def _carried(self, server_round: int) -> list[Carried]:
        """Updates of earlier rounds that this one counts."""
        policy = self.config.collect
        if policy.stragglers == "drop":
            return []
        return carried(self.store, server_round, policy.max_staleness)

    def _evaluate(self, server_round: int, grid: Grid, result: Result) -> None:
        orders = list(self.configure_evaluate(server_round, self.arrays, ConfigRecord(), grid))
        incoming = replies(
            grid, orders, deadline_s=self.config.evaluate_deadline_s, poll_s=self.config.poll_s
        )
        scores = self._record_scores(server_round, incoming)
        if scores is not None:
            result.evaluate_metrics_clientapp[server_round] = scores

    def _record_scores(self, server_round: int, incoming: Iterable[Reply]) -> MetricRecord | None:
        rows: list[dict[str, float]] = []
        for reply in incoming:
            self._orders.learn(reply, self.service.hash)
            client = self._orders.scorer(reply.node) or "unknown"
            found = record_score(self.store, server_round, client, reply)
            if found is not None:
                rows.append(found)
        return mean_metrics(rows)

    def _aggregate(
        self, server_round: int, incoming: Iterable[Reply]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        refused_bytes, refused = 0, 0
        for reply in incoming:
            number = int(reply.group or server_round)
            client = self._orders.client(reply.node, number)
            try:
                self._admit(reply, client, number)
            except RefusedError as error:
                refused += 1
                refused_bytes += update_bytes(reply)
                self._refuse(number, client or "unknown", error)
                if client is not None and number == server_round:
                    self._round.lost()
            else:
                self._round.admitted(late=number != server_round)
        # Replies that Flower's own loop did not bring will not come.
        while self._round.round.state is State.COLLECTING:
            self._round.lost()
        sums = self._secure.finish() if self._secure is not None else None
        cohort, late = self.store.contributions(server_round), self._carried(server_round)
        plan = self._orders.whole.plan
        admitted = len(cohort) + len(late) if sums is None else sums.clients
        bytes_up = sum(row.size_bytes for row in cohort) if sums is None else sums.bytes_up
        facts: dict[str, Any] = {
            "round": server_round,
            "admitted": admitted,
            "refused": refused + (sums.refused if sums else 0),
            "bytes_up": bytes_up + refused_bytes,
            "bytes_down": self._orders.bytes_down + (sums.bytes_down if sums else 0),
        }
        if late:
            facts["carried"] = told(late)
        began = time.perf_counter()
        if self._round.round.state is State.MERGING and admitted < self._round.round.needed:
            # Sums that could not be opened.
            needed = self._round.round.needed
            self._round.happen(Failed(f"{admitted} admitted, the quorum is {needed}"))
        if self._round.round.state is State.MERGING:
            try:
                candidate, publication = self._merge(cohort, late)
                self._round.happen(Merged())
            # What a method cannot merge (too few for its f, a decomposition that fails) costs this
            # round, not the federation; the adapter in service stays.
            except (ValueError, RuntimeError) as error:
                self._round.happen(Failed(one_line(f"the merge failed: {error}")))
        seconds = self._round.seconds
        rows = [*cohort, *(one.row for one in late)]
        if reason := self._round.round.reason:
            log.warning("round %d abandoned: %s", server_round, reason)
            abandoned = {"status": "abandoned", "reason": reason, "seconds": seconds}
            receipt = abandoned_receipt(self.store, self.config, plan, cohort, reason, self._key)
            self._end(lambda: self.store.abandon(server_round, facts | abandoned, receipt))
            return None, None
        published = {
            "status": "published",
            "merge_seconds": time.perf_counter() - began,
            "truncation_error": publication.report["overall_truncation"],
            "seconds": seconds,
            **spent_with(self.config, self.store, publication),
        }
        receipt = merge_receipt(
            self.store,
            self.config,
            plan,
            rows,
            publication,
            candidate,
            self._key,
            self._factors(cohort, late),
        )
        if not self._end(lambda: self.store.publish(publication, facts | published, [receipt])):
            return self.arrays, None
        self.service = candidate
        self._round.happen(Passed())
        log.info("round %d merged %d of %d", server_round, admitted, self._round.round.asked)
        return self.arrays, mean_metrics([row.metrics for row in cohort])

    def _factors(
        self, cohort: Sequence[Contribution], late: Sequence[Carried]
    ) -> list[float] | None:
        """How much each update counts; None: all alike."""
        exponent = self.config.collect.staleness_exponent
        return [1.0] * len(cohort) + [one.weight(exponent) for one in late] if late else None

    def _end(self, write: Callable[[], None]) -> bool:
        """End a round by writing it; False when it was ended otherwise meanwhile, as by a rollback.

        What the store holds by then is in service.
        """
        try:
            write()
        except TakenError as error:
            log.warning("the round comes to nothing: %s", error)
            self._read_again()
            return False
        return True

    def _read_again(self) -> None:
        self.service = read_in_service(self.store, self.service.seeded, self.config)

    def _admit(self, reply: Reply, client: str | None, number: int) -> None:
        """Count the reply to an order of this round.

        Raises:
            RefusedError: It does not count, and why.
        """
        if client is None:
            raise RefusedError("unasked", f"node {reply.node} was not asked in this round")
        start = self._orders.start(client, number)
        self._orders.learn(reply, start.plan.start_hash)
        admitting = self._secure or self._cohort
        admitting.admit(reply, start, client)

    def _refuse(self, server_round: int, client: str, error: RefusedError) -> None:
        reason = one_line(str(error))
        log.warning("round %d: %s refused (%s): %s", server_round, client, error.code, reason)
        self.store.refuse(
            Refusal(round=server_round, client=client, code=error.code, reason=reason)
        )

    def _merge(
        self, cohort: Sequence[Contribution], late: Sequence[Carried]
    ) -> tuple[InService, Publication]:
        """What would stand in service next: its bytes are kept, and nothing names them yet."""
        config, whole = self.config, self._orders.whole
        rows = [*cohort, *(one.row for one in late)]
        names = [*(row.client for row in cohort), *(one.name for one in late)]
        starts = [self._start_of(row) for row in rows]
        ends = [self._cohort.end(row, start) for row, start in zip(rows, starts, strict=True)]
        release: dict[str, Any] = {}
        if config.privacy is None:
            weights = self._factors(cohort, late)
            merged, report = merge_cohort(config, whole, starts, ends, names, weights)
        else:
            spends = next_release(config, self.store, whole.plan.round)
            if spends is None:
                raise ValueError(why_spent(config, self.store, whole.plan.round))
            noise = noise_source(config.privacy.noise_seed, whole.plan.round)
            merged, report = merge_privately(spends, noise, whole, ends, names)
            release = {RELEASE_KEY: spends.model_dump()}
        candidate = successor(self.service, merged, whole.plan, config, self._key)
        assert candidate.blob is not None
        publication = Publication(
            round=whole.plan.round,
            digest=self.store.put(candidate.blob),
            adapter_hash=candidate.hash,
            report=_plain(report) | release,
        )
        return candidate, publication

    def _start_of(self, row: Contribution) -> Start:
        """What a contribution was trained from, after a restart from the store.

        Raises:
            ValueError: Retention has let go of it.
        """
        if not self._orders.knows(row.round):
            before = [one for one in self.store.publications() if one.round < row.round]
            service = InService(self.service.seeded, self.service.seeded)
            if before:
                service = in_service(self.store.get(before[-1].digest), service.seeded, self.config)
            plan = self.plan(row.round, service=service)
            self._orders.recall(service.start(plan, self._key))
        return self._orders.start(row.client, row.round)


def _plain(report: MergeReport) -> dict[str, Any]:
    """The report as the journal keeps it; a cosine's third digit is all that anybody looks at."""
    cosine = np.round(report.cosine, 4).tolist()
    return {**vars(report), "truncation": dict(report.truncation), "cosine": cosine}

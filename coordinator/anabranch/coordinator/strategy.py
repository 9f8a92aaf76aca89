"""The Flower strategy that merges instead of averaging.

One round: plan, collect with quorum and deadline, merge by the recipe, publish, evaluate. A bad
reply is recorded with its reason and left out; it never stops a round.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from anabranch.aggregation import MergeReport, merge
from anabranch.coordinator.admission import (
    Candidate,
    RefusedError,
    claimed_name,
    examine,
    finite_metrics,
    layout_of,
)
from anabranch.coordinator.collect import replies
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.store import Contribution, Publication, Refusal, Store
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire import UpdateMeta, decode_update, encode_update
from anabranch.wire.config import CodecConfig
from anabranch.wire.plan import (
    ADAPTER_KEY,
    ADAPTER_STYPE,
    CLIENT_KEY,
    METRICS_KEY,
    PLAN_KEY,
    RoundPlan,
)

log = logging.getLogger("anabranch.coordinator")


class MergeStrategy(Strategy):
    """Run a federation's rounds on Flower and merge what comes back.

    Args:
        config: The federation.
        template: An adapter that gives modules, ranks, dense start values and the base hash.
        store: Where rounds are kept; an interrupted run goes on from what it holds.
    """

    def __init__(self, config: FederationConfig, template: Adapter, store: Store) -> None:
        if template.base_hash is None:
            raise ValueError("the start adapter names no base hash; write it with write_adapter")
        self.config = config
        self.store = store
        self.base_hash = template.base_hash
        self.layout = layout_of(template)
        self.adapter = seeded_start(template, config.seed)
        self._blob: bytes | None = None  # the adapter in service as it is sent; None: the seed does
        self._nodes: dict[int, str] = {}
        self._met: set[int] = set()
        self._bytes_down = 0
        if (latest := store.latest()) is not None:
            self._blob = store.get(latest.digest)
            _, tensors = decode_update(self._blob, self.layout)
            self.adapter = self.adapter.with_tensors(tensors)

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
            Flower's result: the final adapter and every round's metrics.
        """
        self.summary()
        result = Result()
        deadline_s = timeout or self.config.deadline_s
        self._wait_for_clients(grid)
        latest = self.store.latest()
        first = latest.round + 1 if latest else 1
        for server_round in range(first, (num_rounds or self.config.rounds) + 1):
            config = train_config or ConfigRecord()
            orders = self.configure_train(server_round, self.arrays, config, grid)
            incoming = replies(grid, list(orders), deadline_s=deadline_s, poll_s=self.config.poll_s)
            arrays, metrics = self.aggregate_train(server_round, incoming)
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            orders = self.configure_evaluate(server_round, self.arrays, ConfigRecord(), grid)
            incoming = replies(grid, list(orders), deadline_s=deadline_s, poll_s=self.config.poll_s)
            scores = self.aggregate_evaluate(server_round, incoming)
            if scores is not None:
                result.evaluate_metrics_clientapp[server_round] = scores
            if evaluate_fn and (own := evaluate_fn(server_round, self.arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = own
        return result

    @property
    def arrays(self) -> ArrayRecord:
        """The adapter in service as it is sent; empty while the seed alone describes it."""
        if self._blob is None:
            return ArrayRecord()
        array = Array("uint8", (len(self._blob),), ADAPTER_STYPE, self._blob)
        return ArrayRecord({ADAPTER_KEY: array})

    def plan(self, server_round: int, train: ConfigRecord | None = None) -> RoundPlan:
        """What round ``server_round`` asks of a client."""
        config = self.config
        return RoundPlan(
            federation=config.name,
            run=config.run,
            round=server_round,
            base_hash=self.base_hash,
            start_hash=self.adapter.hash(),
            adapter_seed=config.seed,
            seed=config.seed,
            codec=config.codec,
            train={**config.train, **dict(train or {})},
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan a round: orders for the sampled clients that have not contributed to it yet."""
        self._meet(grid)
        self._plan = self.plan(server_round, config)
        self._round_started = time.monotonic()
        done = {row.client for row in self.store.contributions(server_round)}
        asked = [node for node in self._sample(server_round) if self._nodes[node] not in done]
        self._asked = {node: self._nodes[node] for node in asked}
        self._bytes_down = len(asked) * len(self._blob or b"")
        self.store.note(
            "planned",
            {
                "round": server_round,
                "asked": sorted(self._asked.values()),
                "start_hash": self._plan.start_hash,
            },
        )
        return self._orders(self._plan, asked, arrays, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit replies as they arrive, then merge them; below the quorum nothing changes."""
        config, waiting = self.config, dict(self._asked)
        for message in replies:
            waiting.pop(message.metadata.src_node_id, None)
            self._admit(message)
        for client in sorted(waiting.values()):
            reason = f"no reply within {config.deadline_s:g} s"
            self._refuse(server_round, client, RefusedError("deadline", reason))
        cohort = self.store.contributions(server_round)
        facts: dict[str, Any] = {
            "round": server_round,
            "admitted": len(cohort),
            "refused": sum(row.round == server_round for row in self.store.refusals()),
            "bytes_up": sum(row.size_bytes for row in cohort),
            "bytes_down": self._bytes_down,
        }
        if len(cohort) < config.quorum:
            log.warning(
                "round %d abandoned: %d admitted, quorum %d",
                server_round, len(cohort), config.quorum,
            )  # fmt: skip
            facts["seconds"] = time.monotonic() - self._round_started
            self.store.note("round", {**facts, "status": "abandoned"})
            return None, None
        started = time.perf_counter()
        report = self._merge(server_round, cohort)
        facts["merge_seconds"] = time.perf_counter() - started
        facts["seconds"] = time.monotonic() - self._round_started
        facts["truncation_error"] = report.overall_truncation
        self.store.note("round", {**facts, "status": "published"})
        log.info("round %d merged %d of %d", server_round, len(cohort), len(self._asked))
        return self.arrays, _mean_metrics([row.metrics for row in cohort])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every known client to score the adapter in service."""
        every = self.config.evaluate_every
        if not every or server_round % every:
            return []
        plan = self.plan(server_round)
        nodes = sorted(self._nodes, key=lambda node: self._nodes[node])
        return self._orders(plan, nodes, arrays, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Record each client's scores; their plain mean is returned."""
        scores: list[dict[str, float]] = []
        for message in replies:
            client = claimed_name(message, self._nodes)
            if message.has_error():
                reason = message.error.reason or f"code {message.error.code}"
                self.store.note(
                    "evaluate-failed", {"round": server_round, "client": client, "reason": reason}
                )
                continue
            metrics = finite_metrics(message.content.metric_records.get(METRICS_KEY))
            self.store.note("evaluate", {"round": server_round, "client": client, **metrics})
            scores.append(metrics)
        return _mean_metrics(scores)

    def _orders(
        self, plan: RoundPlan, nodes: Sequence[int], arrays: ArrayRecord, kind: str
    ) -> list[Message]:
        record = ConfigRecord({PLAN_KEY: plan.model_dump_json(), "server-round": plan.round})
        content = RecordDict({PLAN_KEY: record})
        if len(arrays):
            content[ADAPTER_KEY] = arrays
        # Waiting for a reply ends with the deadline; its message may live a little longer.
        ttl = self.config.deadline_s + 60
        return [Message(content, node, kind, ttl=ttl, group_id=str(plan.round)) for node in nodes]

    def _wait_for_clients(self, grid: Grid) -> None:
        end = time.monotonic() + self.config.join_timeout_s
        while True:
            self._meet(grid)
            if len(self._nodes) >= self.config.clients:
                return
            if time.monotonic() >= end:
                raise RuntimeError(
                    f"{len(self._nodes)} of {self.config.clients} clients joined within "
                    f"{self.config.join_timeout_s:g} s; start the missing nodes or lower 'clients'"
                )
            time.sleep(max(self.config.poll_s, 0.1))

    def _meet(self, grid: Grid) -> None:
        """Ask nodes that are new for their name; one name belongs to one node at a time."""
        present = set(grid.get_node_ids())
        self._nodes = {node: name for node, name in self._nodes.items() if node in present}
        new = sorted(present - self._met)
        self._met |= present
        orders = [Message(RecordDict(), node, MessageType.QUERY, ttl=120) for node in new]
        for message in replies(grid, orders, deadline_s=60, poll_s=self.config.poll_s):
            node = message.metadata.src_node_id
            if message.has_error() or CLIENT_KEY not in message.content.config_records:
                reason = message.error.reason if message.has_error() else "no name in the reply"
                self.store.note("meet-failed", {"node": str(node), "reason": reason})
                continue
            name = str(message.content.config_records[CLIENT_KEY].get(CLIENT_KEY, ""))[:200]
            if not name or name in self._nodes.values():
                self.store.note(
                    "meet-failed", {"node": str(node), "reason": f"name {name!r} taken"}
                )
                continue
            self._nodes[node] = name

    def _sample(self, server_round: int) -> list[int]:
        nodes = sorted(self._nodes, key=lambda node: self._nodes[node])
        count = max(1, round(self.config.fraction * len(nodes)))
        # Names, not node numbers, decide: Flower draws the numbers anew in each run.
        chosen = random.Random(f"{self.config.seed}/{server_round}").sample(
            range(len(nodes)), count
        )
        return [nodes[index] for index in sorted(chosen)]

    def _admit(self, message: Message) -> None:
        plan = self._plan
        client = claimed_name(message, self._asked)
        try:
            candidate = examine(message, plan, self.layout, client, self.config.max_norm)
            self._keep(candidate)
        except RefusedError as error:
            self._refuse(plan.round, client, error)

    def _keep(self, candidate: Candidate) -> None:
        contribution = Contribution(
            round=self._plan.round,
            client=candidate.client,
            digest=self.store.put(candidate.blob),  # the bytes first, the row second
            size_bytes=len(candidate.blob),
            metrics=dict(candidate.metrics),
        )
        if not self.store.admit(contribution):
            raise RefusedError("duplicate", "this client already has an update in this round")

    def _refuse(self, server_round: int, client: str, error: RefusedError) -> None:
        log.warning("round %d: %s refused (%s): %s", server_round, client, error.code, error)
        reason = str(error)[:500]
        self.store.refuse(
            Refusal(round=server_round, client=client, code=error.code, reason=reason)
        )

    def _merge(self, server_round: int, cohort: Sequence[Contribution]) -> MergeReport:
        start = self.adapter
        before = start.tensors()
        ends: list[Adapter] = []
        for row in cohort:
            _, changes = decode_update(self.store.get(row.digest), self.layout)
            ends.append(start.with_tensors({name: before[name] + changes[name] for name in before}))
        names = [row.client for row in cohort]
        result = merge(ends, self.config.recipe, start=start, names=names)
        meta = UpdateMeta(
            kind="adapter",
            base_hash=self.base_hash,
            start_hash=self._plan.start_hash,
            federation=self.config.name,
            run=self.config.run,
            round=server_round,
            client="",
            nonce=b"",
            seed=self.config.seed,
            examples=0,
        )
        encoded = encode_update(
            result.adapter.tensors(), meta, CodecConfig(name="dense", dtype=self.config.down)
        )
        # What the clients will decode is the adapter in service, to the bit.
        self.adapter = start.with_tensors(encoded.sent)
        self._blob = encoded.blob
        self.store.publish(
            Publication(
                round=server_round,
                digest=self.store.put(encoded.blob),
                adapter_hash=self.adapter.hash(),
                report=_plain(result.report),
            )
        )
        return result.report


def _plain(report: MergeReport) -> dict[str, Any]:
    """The report as the journal keeps it; a cosine's third digit is all that anybody looks at."""
    cosine = [[round(value, 4) for value in row] for row in report.cosine]
    return {**vars(report), "truncation": dict(report.truncation), "cosine": cosine}


def _mean_metrics(rows: Sequence[dict[str, float]]) -> MetricRecord | None:
    if not rows:
        return None
    shared = sorted(set.intersection(*(set(row) for row in rows)))
    return MetricRecord({name: sum(row[name] for row in rows) / len(rows) for name in shared})

"""The Flower strategy that merges instead of averaging.

One round: plan, collect with quorum and deadline, merge by the recipe, publish, evaluate. A bad
reply is recorded with its reason and left out; it never stops a round.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from anabranch.aggregation import MergeReport
from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.registry import named
from anabranch.coordinator.admission import SCORES, RefusedError, claims, examine, layouts
from anabranch.coordinator.collect import Reply, replies
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.merging import check_method, merge_cohort, merge_privately
from anabranch.coordinator.privacy.accountant import (
    epsilon_spent,
    noise_multiplier,
    rounds_left,
)
from anabranch.coordinator.roster import Roster
from anabranch.coordinator.start import Start, adapter_record, at_rank
from anabranch.coordinator.store import Contribution, FullError, Publication, Refusal, Store
from anabranch.coordinator.trust import Trust
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.frozen import from_tensors, split
from anabranch.vectors.importance import from_flat_importance
from anabranch.wire import (
    compensate,
    decode_adapter,
    decode_forms,
    encode_adapter,
    encode_change,
    remainder,
)
from anabranch.wire.codecs.codec import Form
from anabranch.wire.config import CodecConfig
from anabranch.wire.errors import one_line
from anabranch.wire.plan import METRICS_KEY, UPDATE_KEY, RoundPlan, sent_down

log = logging.getLogger("anabranch.coordinator")

Decoded = tuple[Mapping[str, Form], Mapping[str, Tensor]]
"""An update's changes and their importance."""

DECODED_BYTES = 256 << 20
"""Decoded updates kept from admission to the merge; what is beyond is decoded again."""


class MergeStrategy(Strategy):
    """Run a federation's rounds on Flower and merge what comes back.

    Args:
        config: The federation.
        template: An adapter that gives modules, ranks, dense start values and the base hash.
        store: Where rounds are kept; an interrupted run goes on from what it holds.
        trust: Keys, where the federation is signed.

    Raises:
        ValueError: The template names no base, the method cannot merge what is asked, or keys are
            missing.
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
        groups(config.recipe, [*template.lora, *template.dense], config.quorum)
        check_method(config, template, self._method)
        self.config = config
        self.store = store
        self._trust = trust
        self._key = trust.key if trust else None
        self.base_hash = template.base_hash
        self._seeded = seeded_start(template, config.seed)
        self.adapter = self._seeded
        self.roster = Roster(
            config.poll_s,
            lambda node, why: store.note("meet-failed", {"node": node, "reason": why}),
        )
        self._blob: bytes | None = None  # the adapter in service as it is sent; None: the seed does
        self._starts: dict[int | None, Start] = {}  # this round's, by rank
        self._asked: dict[int, str] = {}
        self._decoded: dict[str, Decoded] = {}  # this round's, by artifact
        self._held: dict[int, str] = {}  # hash of the adapter that a node is known to hold
        self._change: tuple[str, bytes] | None = None  # from the adapter before the one in service
        self._owed: Mapping[str, Tensor] = {}  # what coding left out of that change
        self._bytes_down = 0  # of the adapter, with this round's orders
        if (latest := store.latest()) is not None:
            self._blob = store.get(latest.digest)
            self.adapter = decode_adapter(self._blob, self._seeded, config.trains)

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
            if (spent := self._budget_spent()) is not None:
                log.warning("round %d is not begun: %s", server_round, spent)
                self.store.note("stopped", {"round": server_round, "reason": spent})
                break
            # Nodes come and go between rounds: one that cannot reach its quorum is not begun.
            self.roster.wait_for(grid, needed, self.config.join_timeout_s)
            orders = self.configure_train(
                server_round, self.arrays, train_config or ConfigRecord(), grid
            )
            incoming = replies(
                grid,
                list(orders),
                deadline_s=timeout or self.config.deadline_s,
                poll_s=self.config.poll_s,
            )
            arrays, metrics = self._aggregate(server_round, incoming)
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            self.store.tidy()
            self._evaluate(server_round, grid, result)
            if evaluate_fn and (own := evaluate_fn(server_round, self.arrays)) is not None:
                result.evaluate_metrics_serverapp[server_round] = own
        self.store.note("ended", {"adapter_hash": self.adapter.hash()})
        return result

    @property
    def arrays(self) -> ArrayRecord:
        """The adapter in service as it is sent; empty while the seed alone describes it."""
        return adapter_record(self._blob)

    def plan(self, server_round: int, train: ConfigRecord | None = None) -> RoundPlan:
        """What round ``server_round`` asks of a client."""
        config = self.config
        return RoundPlan(
            federation=config.name,
            run=config.run,
            round=server_round,
            base_hash=self.base_hash,
            start_hash=self.adapter.hash(),
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
        self._plan = self.plan(server_round, config)
        if self._trust is not None:
            self._plan = self._trust.begin_round(self._plan)
        self._starts = {None: self._whole(self._plan)}
        self._began = time.monotonic()
        self._decoded.clear()
        done = {row.client for row in self.store.contributions(server_round)}
        sampled = self.roster.sample(self.config.fraction, f"{self.config.seed}/{server_round}")
        self._asked = {node: name for node, name in sampled.items() if name not in done}
        self.store.note(
            "planned",
            {
                "round": server_round,
                "asked": sorted(self._asked.values()),
                "start_hash": self._plan.start_hash,
            },
        )
        starts = {node: self._start(name) for node, name in self._asked.items()}
        return self._orders(starts, MessageType.TRAIN)

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
        done = {
            row["client"] for row in self.store.notes("evaluate") if row["round"] == server_round
        }
        self._asked = {node: name for node, name in self.roster.nodes().items() if name not in done}
        whole = self._whole(self.plan(server_round))
        orders = self._orders(dict.fromkeys(self._asked, whole), MessageType.EVALUATE)
        self.store.note("scoring", {"round": server_round, "bytes_down": self._bytes_down})
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

    def _published(self) -> int:
        """Rounds that were published: what privacy was spent on."""
        return sum(row["status"] == "published" for row in self.store.notes("round"))

    def _privacy_spent(self) -> dict[str, Any]:
        """What is known of clients once this round is published, for its record."""
        privacy = self.config.privacy
        if privacy is None:
            return {}
        multiplier = noise_multiplier(privacy, self.config.rounds)
        spent = epsilon_spent(multiplier, self._published() + 1, privacy.delta)
        # A seeded draw can be taken off again.
        epsilon = spent if privacy.noise_seed is None else None
        return {"epsilon": epsilon, "delta": privacy.delta, "noise_multiplier": multiplier}

    def _budget_spent(self) -> str | None:
        """Why privacy allows no further round; None while it does."""
        privacy = self.config.privacy
        if privacy is None:
            return None
        multiplier, published = noise_multiplier(privacy, self.config.rounds), self._published()
        if rounds_left(privacy, multiplier, published):
            return None
        spent = epsilon_spent(multiplier, published, privacy.delta)
        return (
            f"{published} rounds have spent an epsilon of {spent:.3g} of {privacy.epsilon:g}, "
            "and one more would go beyond"
        )

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
            about = {"round": server_round, "client": self._asked.get(reply.node, "unknown")}
            self._learn(reply)
            if reply.message is None:
                self.store.note(
                    "evaluate-failed", {**about, "code": reply.code, "reason": reply.reason}
                )
                continue
            found = claims(reply.message.content.get(METRICS_KEY), SCORES)
            self.store.note("evaluate", {**about, **found})
            rows.append(found)
        return _mean_metrics(rows)

    def _whole(self, plan: RoundPlan) -> Start:
        """The adapter in service with a plan for it."""
        parts = split(self.adapter, self._seeded)
        return Start(plan, *parts, self._blob, self._key, self._change)

    def _start(self, client: str) -> Start:
        """What this round hands a client."""
        rank = self.config.ranks.get(client)
        if rank not in self._starts:
            assert rank is not None
            whole = self._starts[None]
            self._starts[rank] = at_rank(whole, rank, self._method, self.config.down)
        return self._starts[rank]

    def _orders(self, starts: Mapping[int, Start], kind: str) -> list[Message]:
        # Waiting for a reply ends with the deadline; its message may live a little longer.
        ttl = self.config.deadline_s + 60
        orders, self._bytes_down = [], 0
        for node, start in starts.items():
            sent = start.sent(self._held.get(node))
            self._bytes_down += len(sent or b"")
            group = str(start.plan.round)
            orders.append(Message(start.content(sent), node, kind, ttl=ttl, group_id=group))
        return orders

    def _learn(self, reply: Reply) -> None:
        """A node that answered holds the adapter its order was about; one that failed may not."""
        self._held.pop(reply.node, None)
        if self.config.down_codec is not None and reply.message is not None:
            self._held[reply.node] = self.adapter.hash()

    def _aggregate(
        self, server_round: int, incoming: Iterable[Reply]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        refused_bytes, refused = 0, 0
        bytes_down = self._bytes_down
        for reply in incoming:
            self._learn(reply)
            try:
                self._admit(reply)
            except RefusedError as error:
                refused += 1
                refused_bytes += _update_bytes(reply)
                self._refuse(server_round, self._asked.get(reply.node, "unknown"), error)
        cohort = self.store.contributions(server_round)
        facts: dict[str, Any] = {
            "round": server_round,
            "admitted": len(cohort),
            "refused": refused,
            "bytes_up": sum(row.size_bytes for row in cohort) + refused_bytes,
            "bytes_down": bytes_down,
        }
        began = time.perf_counter()
        reason = ""
        if len(cohort) < self.config.quorum:
            reason = f"{len(cohort)} admitted, the quorum is {self.config.quorum}"
        else:
            try:
                publication, truncation = self._merge(server_round, cohort)
            # What a method cannot merge (too few for its f, a decomposition that fails) costs this
            # round, not the federation; the adapter in service stays.
            except (ValueError, RuntimeError) as error:
                reason = one_line(f"the merge failed: {error}")
        seconds = time.monotonic() - self._began
        if reason:
            log.warning("round %d abandoned: %s", server_round, reason)
            abandoned = {"status": "abandoned", "reason": reason, "seconds": seconds}
            self.store.note("round", facts | abandoned)
            return None, None
        published = {
            "status": "published",
            "merge_seconds": time.perf_counter() - began,
            "truncation_error": truncation,
            "seconds": seconds,
            **self._privacy_spent(),
        }
        self.store.publish(publication, facts | published)
        log.info("round %d merged %d of %d", server_round, len(cohort), len(self._asked))
        return self.arrays, _mean_metrics([row.metrics for row in cohort])

    def _admit(self, reply: Reply) -> None:
        if reply.message is None:
            raise RefusedError(reply.code, reply.reason)
        client = self._asked.get(reply.node)
        if client is None:
            raise RefusedError("unasked", f"node {reply.node} was not asked in this round")
        start = self._start(client)
        candidate = examine(reply.message, start, client, self.config.max_norm, self._trust)
        try:
            contribution = Contribution(
                round=start.plan.round,
                client=client,
                digest=self.store.put(candidate.blob),  # the bytes first, the row second
                size_bytes=candidate.size_bytes,
                nonce=candidate.meta.nonce.hex(),
                metrics=dict(candidate.metrics),
            )
            counted = self.store.admit(contribution)
        except FullError as error:
            raise RefusedError("no-room", str(error)) from error
        if not counted:
            raise RefusedError("duplicate", "this client already has an update in this round")
        if self._trust is not None:
            self._trust.nonces.add(contribution.nonce)
        held = sum(change.nbytes for change in candidate.changes.values())
        held += sum(part.nbytes for part in candidate.importance.values())
        if (len(self._decoded) + 1) * held <= DECODED_BYTES:
            self._decoded[contribution.digest] = (candidate.changes, candidate.importance)

    def _refuse(self, server_round: int, client: str, error: RefusedError) -> None:
        reason = one_line(str(error))
        log.warning("round %d: %s refused (%s): %s", server_round, client, error.code, reason)
        self.store.refuse(
            Refusal(round=server_round, client=client, code=error.code, reason=reason)
        )

    def _merge(
        self, server_round: int, cohort: Sequence[Contribution]
    ) -> tuple[Publication, float]:
        """The next adapter, kept but not in service yet, and the merge's truncation error."""
        starts = [self._start(row.client) for row in cohort]
        ends = [self._end(row, start) for row, start in zip(cohort, starts, strict=True)]
        names = [row.client for row in cohort]
        if self.config.privacy is None:
            merged, report = merge_cohort(self.config, self._starts[None], starts, ends, names)
        else:
            merged, report = merge_privately(
                self.config.privacy, self.config, self._starts[None], ends, names
            )
        change, owed = self._change, self._owed
        if self.config.down_codec is not None:
            merged, change, owed = self._changed(merged, self.config.down_codec)
        encoded = encode_adapter(merged, self._plan, self.config.down, self._key)
        digest = self.store.put(encoded.blob)
        # What the clients will decode is the adapter in service, to the bit.
        self.adapter = from_tensors(self._seeded, {**merged.tensors(), **encoded.sent})
        self._blob, self._change, self._owed = encoded.blob, change, owed
        publication = Publication(
            round=server_round,
            digest=digest,
            adapter_hash=self.adapter.hash(),
            report=_plain(report),
        )
        return publication, report.overall_truncation

    def _changed(
        self, merged: Adapter, codec: CodecConfig
    ) -> tuple[Adapter, tuple[str, bytes], Mapping[str, Tensor]]:
        """The adapter that clients come to who add the coded change to the one they hold.

        Returns:
            It, the change from which adapter, and what coding left out.
        """
        before = self.adapter.tensors(sent_down(self.config.trains))
        after = merged.tensors(sent_down(self.config.trains))
        change = {name: after[name].float() - before[name].float() for name in before}
        wanted = compensate(change, self._owed, codec.feedback)
        encoded = encode_change(self.adapter, wanted, self._plan, codec, self._key)
        owed = remainder(wanted, encoded.sent) if codec.feedback else {}
        moved = {name: before[name] + encoded.sent[name] for name in before}
        adapter = self.adapter.with_tensors({**self.adapter.tensors(), **moved})
        return adapter, (self.adapter.hash(), encoded.blob), owed

    def _end(self, row: Contribution, start: Start) -> Adapter:
        """What a client trained: its start and the change it sent, and how much that matters to it.

        Raises:
            ValueError: It was made from another start.
        """
        kept = self._decoded.pop(row.digest, None)
        changes, importance = kept or self._decode(row, start)
        before = start.adapter.tensors()
        moved = {name: before[name] + change.dense() for name, change in changes.items()}
        end = start.adapter.with_tensors({**before, **moved})
        return replace(end, importance=from_flat_importance(importance))

    def _decode(self, row: Contribution, start: Start) -> Decoded:
        """An update that was not kept in memory, out of its artifact."""
        meta, changes, importance = decode_forms(
            self.store.get(row.digest), *layouts(start.adapter, start.plan)
        )
        # The SVD of another machine may turn a truncated start differently.
        if meta.start_hash != start.plan.start_hash:
            raise ValueError(
                f"{row.client} trained from {meta.start_hash[:12]}, which this machine makes "
                f"{start.plan.start_hash[:12]}; finish a round where it was begun"
            )
        return changes, importance


def _plain(report: MergeReport) -> dict[str, Any]:
    """The report as the journal keeps it; a cosine's third digit is all that anybody looks at."""
    cosine = np.round(report.cosine, 4).tolist()
    return {**vars(report), "truncation": dict(report.truncation), "cosine": cosine}


def _update_bytes(reply: Reply) -> int:
    """Bytes of the update a refused reply carried."""
    record = reply.message.content.array_records.get(UPDATE_KEY) if reply.message else None
    return sum(len(array.data) for array in record.values()) if record else 0


def _mean_metrics(rows: Sequence[dict[str, float]]) -> MetricRecord | None:
    if not rows:
        return None
    shared = sorted(set.intersection(*(set(row) for row in rows)))
    return MetricRecord({name: sum(row[name] for row in rows) / len(rows) for name in shared})

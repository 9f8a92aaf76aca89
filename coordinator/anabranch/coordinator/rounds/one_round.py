"""One round under way: whom it asks, what it admits, and what comes of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from anabranch.coordinator.admission import RefusedError
from anabranch.coordinator.cohort import NO_ROOM, Cohort, update_bytes
from anabranch.coordinator.collect import GONE, Closed, Mail, Reply
from anabranch.coordinator.coordination import Coordination
from anabranch.coordinator.gate import judged
from anabranch.coordinator.in_service import InService
from anabranch.coordinator.privacy.budget import spent_with
from anabranch.coordinator.receipts import abandoned_receipt, merge_receipt
from anabranch.coordinator.rounds.again import Again
from anabranch.coordinator.rounds.control import LOOK_S, Want
from anabranch.coordinator.rounds.driver import Driver, terms_of, was_closed
from anabranch.coordinator.rounds.machine import Failed, Merged, Passed, Rejected, State
from anabranch.coordinator.rounds.material import FAILS, Material, said
from anabranch.coordinator.rounds.stragglers import Counted, told
from anabranch.coordinator.rounds.uploaders import Arrivals
from anabranch.coordinator.secure.round import SecureRound, Sums
from anabranch.coordinator.store import (
    FullError,
    Refusal,
    Store,
    StoreError,
)
from anabranch.wire.errors import one_line

log = logging.getLogger("anabranch.coordinator")

WAITED_FOR = ("deadline", "closed")
"""Codes of refusals that are no word of the node's."""


class OneRound:
    """A round from its plan to its publication, or its end without one.

    Args:
        here: The federation.
        number: Which round.
        service: The adapter that it starts from.
        deadline_s: Seconds it waits for updates.
        train: Further fields of the clients' ``TrainPlan``.

    Attributes:
        driver: Where it stands.
        counted: What it merges; known once ``finish`` was called.
    """

    def __init__(
        self,
        here: Coordination,
        number: int,
        service: InService,
        deadline_s: float,
        train: Mapping[str, object] | None = None,
    ) -> None:
        self._here, self._number, self._service = here, number, service
        plan = here.plan(number, service, train)
        if here.trust is not None:
            plan = here.trust.begin_round(plan, first_planned(here.store, number))
        self.plan = plan
        self._cohort = Cohort(here.store, here.trust, here.config.max_norm)
        self._material = Material(here, number, service, self._cohort)
        self._secure: SecureRound | None = None
        self._refused = self._refused_bytes = 0
        self._no_room = ""  # why an update was refused that could have been kept
        self._heard: set[str] = set()  # clients of which an update counts
        self._uploaders: list[str] = []  # asked, and without a node
        self._arrivals = Arrivals(number, here.store, LOOK_S)
        self._again = Again(here.roster)
        self._grid: Grid | None = None  # where who is gone may be again
        self.driver = Driver(number, terms_of(here.config, deadline_s), here.store, here.control)
        self.counted = Counted()

    def begin(self, grid: Grid, owed: Sequence[tuple[int, str]] = ()) -> list[Message]:
        """Orders for the sampled clients that have not contributed to it yet.

        Args:
            grid: Flower's connection to the nodes.
            owed: Nodes whose reply is still to come, and since which round.
        """
        here = self._here
        self._grid = grid
        late = {int(group) for _, group in owed}
        here.orders.begin(self._service.start(self.plan, here.key), late)
        done = {row.client for row in here.store.contributions(self._number)}
        busy = {node for node, group in owed if not self._is_too_late(group)}
        asked = self._to_ask(done, busy)
        facts = {
            "round": self._number,
            "asked": sorted(asked.values()),
            "start_hash": self.plan.start_hash,
            "planned_s": int(time.time()),
        }
        here.store.note("planned", facts)
        if here.config.secure is None:
            self._material.check_late()
            self._heard = done | {one.row.client for one in self._material.counted().late}
            self.driver.asked(len(asked), len(self._heard), len(owed))
            self._arrivals.begin(asked.values(), done)
            # Who has no node uploads.
            nodes = {node: name for node, name in asked.items() if node >= 0}
            self._uploaders = [name for node, name in asked.items() if node < 0]
            return here.orders.train(nodes)
        assert here.trust is not None
        self._secure = SecureRound(
            here.config, here.config.secure, here.orders.whole, here.store, here.trust, grid
        )
        ready = self._secure.begin(asked)
        here.orders.part(self._secure.starts)
        self.driver.asked(len(ready), self._secure.summed())
        return [self._secure.deliver(order) for order in here.orders.train(ready)]

    def collect(self, mail: Mail, orders: Sequence[Message]) -> Iterator[Reply]:
        """The replies that it takes, and one for each that it gives up."""
        stale = Closed("closed", "too many rounds were published before it came")
        yield from mail.give_up(stale, self._is_too_late)
        yield from mail.send(orders)
        yield from mail.arrivals(lambda: self._closed(mail), self._arrivals.waits)
        closed = self.driver.closed()
        assert closed is not None  # every order has its reply
        yield from mail.give_up(closed, self._is_too_late)
        if self._is_too_late(str(self._number)):
            for client in self._arrivals.missing(self._uploaders):
                self.refuse(self._number, client, RefusedError(closed.code, closed.reason))

    def admit(self, incoming: Iterable[Reply]) -> None:
        """Count what can be counted of these replies, and record why the rest cannot."""
        for reply in incoming:
            number = int(reply.group or self._number)
            client = self._here.orders.client(reply.node, number)
            try:
                self._admit(reply, client, number)
            except RefusedError as error:
                # An upload was first; it counts, and its client is not lost.
                if number == self._number and client in self._arrivals.uploaded:
                    continue
                self._no_room = str(error) if error.code == NO_ROOM else self._no_room
                self._refused += 1
                self._refused_bytes += update_bytes(reply)
                self.refuse(number, client, error)
                if error.code not in (*WAITED_FOR, GONE):
                    self._here.roster.doubt(reply.node)
                if number == self._number and self._is_gone(client, error):
                    self.driver.gone()
                elif number != self._number:
                    self.driver.lost(late=True)
                elif client is not None:
                    self._arrivals.lost(client)
                    self.driver.lost()
            else:
                assert client is not None
                if number == self._number:
                    self._arrivals.answered(client)
                    self._came_back(client)
                self.driver.admitted(number != self._number, client in self._heard)
                self._heard.add(client)
        # Replies that Flower's own loop did not bring will not come.
        while self.driver.round.state is State.COLLECTING:
            self.driver.lost(late=self.driver.round.owed > 0)

    def refuse(self, number: int, client: str | None, error: RefusedError) -> None:
        """Record why a reply to an order of some round does not count."""
        refuse(self._here.store, number, client, error)

    def finish(self) -> InService | None:
        """Merge what it holds and publish that; below the quorum nothing changes.

        Returns:
            What is in service now; None if the round was abandoned.

        Raises:
            TakenError: The round was ended otherwise meanwhile, as by a rollback.
            StoreError: There is no room for what it makes, or it is short of its quorum for updates
                that there was no room for: it goes on, as it stands, once there is.
        """
        if self._no_room and self._is_short():
            raise FullError(self._no_room)
        sums = self._sums()
        self.counted = self._material.counted()
        facts = self._facts(sums)
        began = time.perf_counter()
        # Sums that could not be opened.
        self._check_quorum(facts["admitted"])
        if self.driver.round.state is State.MERGING:
            try:
                candidate, publication, self.counted = self._material.merged(self.counted)
            # The cohort stands, and is merged once there is room.
            except StoreError:
                raise
            # What a method cannot merge (too few for its f, a decomposition that fails), or cannot
            # be read any more, costs this round, not the federation; the adapter in service stays.
            except FAILS as error:
                self.driver.happen(Failed(one_line(f"the merge failed: {said(error)}")))
                facts["failed"] = True
            else:
                facts = self._facts(sums)
                self._check_quorum(facts["admitted"])
                if not self.driver.round.over:
                    self.driver.happen(Merged())
        gate = self._here.gate
        if gate is not None and self.driver.round.state is State.GATING:
            kept, facts["gate"] = judged(gate, self._service.adapter, candidate.adapter)
            if kept:
                self.driver.happen(Rejected(one_line(kept)))
                if publication.report.get("suspicion") is not None:
                    # Nothing is published that would say who stood out in it.
                    facts["suspicion"] = publication.report["suspicion"]
        facts["seconds"] = self.driver.seconds
        if reason := self.driver.round.reason:
            self._abandon(reason, facts)
            return None
        here = self._here
        facts |= {
            "status": "published",
            "merge_seconds": time.perf_counter() - began,
            "truncation_error": publication.report["overall_truncation"],
            **spent_with(here.config, here.store, publication),
        }
        receipt = merge_receipt(
            here.store,
            here.config,
            self.plan,
            self.counted.rows,
            publication,
            candidate,
            here.key,
            self.counted.factors(here.config.collect.staleness_exponent),
            facts.get("gate"),
        )
        here.store.publish(publication, facts, [receipt])
        self.driver.happen(Passed())
        asked = self.driver.round.asked
        log.info("round %d merged %d of %d", self._number, facts["admitted"], asked)
        return candidate

    def _sums(self) -> Sums | None:
        """Open a secure round's sums; those of a round that merges nothing stay closed."""
        if self._secure is None:
            return None
        now = self.driver.round
        return (
            self._secure.finish() if now.state is State.MERGING else self._secure.leave(now.reason)
        )

    def _is_short(self) -> bool:
        """Whether it is abandoned for want of updates, and nobody asked for its end."""
        now, want = self.driver.round, self._here.control.want()
        asked = want in (Want.DRAIN, Want.ABORT)
        return now.state is State.ABANDONED and now.admitted < now.needed and not asked

    def _check_quorum(self, admitted: int) -> None:
        """End a round that was to be merged and has too few."""
        now = self.driver.round
        if now.state is State.MERGING and admitted < now.needed:
            self.driver.happen(Failed(f"{admitted} admitted, the quorum is {now.needed}"))

    def _abandon(self, reason: str, facts: dict[str, Any]) -> None:
        log.warning("round %d abandoned: %s", self._number, reason)
        here, cohort = self._here, self.counted.own
        receipt = abandoned_receipt(
            here.store, here.config, self.plan, cohort, reason, here.key, facts.get("gate")
        )
        here.store.abandon(self._number, facts | {"status": "abandoned", "reason": reason}, receipt)

    def _facts(self, sums: Sums | None) -> dict[str, Any]:
        """What its record says however it ends."""
        rows, down = self.counted.own, self._here.orders.bytes_down
        facts: dict[str, Any] = {
            "round": self._number,
            "admitted": len(self.counted.rows) if sums is None else sums.clients,
            "refused": self._refused + (sums.refused if sums else 0),
            "bytes_up": self._refused_bytes
            + (sum(row.size_bytes for row in rows) if sums is None else sums.bytes_up),
            "bytes_down": down + (sums.bytes_down if sums else 0),
        }
        if self.counted.late:
            facts["carried"] = told(self.counted.late)
        return facts

    def _is_gone(self, client: str | None, error: RefusedError) -> bool:
        """Whether a client may be asked again, since no word of its own says that it failed."""
        if error.code != GONE or client is None or self._secure is not None:
            return False
        return self._again.lose(client)

    def _came_back(self, client: str) -> None:
        if self._again.found(client):
            self.driver.back()

    def _ask_again(self, mail: Mail) -> None:
        """Ask clients once more whose order was lost, and whose node is there again."""
        assert self._grid is not None
        if self.driver.round.state is not State.COLLECTING:
            return
        if not (there := self._again.there(self._grid)):
            return
        lost = {reply.node for reply in mail.send(self._here.orders.train_again(there))}
        clients = sorted(name for node, name in there.items() if node not in lost)
        self._again.asked(clients)
        for _ in clients:
            self.driver.back()
        if clients:
            log.info("round %d: asked again: %s", self._number, ", ".join(clients))
            self._here.store.note("asked-again", {"round": self._number, "clients": clients})

    def _closed(self, mail: Mail) -> Closed | None:
        """Why nothing more is waited for, once what was uploaded meanwhile is counted."""
        if self._secure is None:
            self._ask_again(mail)
            for client, expected in self._arrivals.new():
                self._came_back(client)
                self.driver.admitted(False, client in self._heard, beside=not expected)
                self._heard.add(client)
        return self.driver.closed()

    def _admit(self, reply: Reply, client: str | None, number: int) -> None:
        """Count the reply to an order of a round.

        Raises:
            RefusedError: It does not count, and why.
        """
        if client is None:
            raise RefusedError("unasked", f"node {reply.node} was not asked in this round")
        start = self._here.orders.start(client, number)
        self._here.orders.learn(reply, start.plan.start_hash)
        admitting = self._secure or self._cohort
        admitting.admit(reply, start, client)

    def _to_ask(self, done: set[str], busy: set[int]) -> dict[int, str]:
        """Nodes and clients to ask, beside those that contributed, or are at work."""
        here = self._here
        # Sums that were opened before an interruption are all there will be.
        settled = bool(done) if here.config.secure else was_closed(here.store, self._number)
        if settled:
            return {}
        count = here.config.asked(len(here.roster.nodes()))
        sampled = here.roster.sample(count, f"{here.config.seed}/{self._number}")
        asked = {
            node: name for node, name in sampled.items() if name not in done and node not in busy
        }
        if here.config.privacy is None:
            return asked
        # Others may be there than when the round began, and what is divided by stays.
        return dict(list(asked.items())[: max(0, count - len(done))])

    def _is_too_late(self, group: str) -> bool:
        """Whether an update of a round will not be merged any more."""
        policy = self._here.config.collect
        since = sum(row.round >= int(group) for row in self._here.store.publications())
        return policy.stragglers == "drop" or since > policy.max_staleness


def refuse(store: Store, number: int, client: str | None, error: RefusedError) -> None:
    """Record why a reply to an order of some round does not count."""
    reason, name = one_line(str(error)), client or "unknown"
    about = {"round": number, "client": name, "code": error.code}
    log.warning("round %d: %s refused (%s): %s", number, name, error.code, reason, extra=about)
    store.refuse(Refusal(round=number, client=name, code=error.code, reason=reason))


def first_planned(store: Store, number: int) -> int | None:
    """When a round was planned first, in Unix seconds: what was made since then is fresh."""
    rows = [row for row in store.notes("planned") if row["round"] == number]
    times = [row["planned_s"] for row in rows if "planned_s" in row]
    return min(times, default=None)

"""What a federation takes by way of the API: the same admission as of what Flower brings."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.aggregation.registry import named
from anabranch.coordinator.admission import (
    TRAIN_METRICS,
    RefusedError,
    claims,
    examine_update,
    most_bytes,
)
from anabranch.coordinator.cohort import keep
from anabranch.coordinator.coordination import plan_of
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService, in_service
from anabranch.coordinator.orders import Orders
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import Contribution, Refusal, Store
from anabranch.coordinator.trust import Trust
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire.errors import one_line


@dataclass(frozen=True)
class UnderWay:
    """A round that was planned.

    Attributes:
        number: Which.
        asked: Clients that were asked.
        planned_s: When, in Unix seconds.
    """

    number: int
    asked: frozenset[str]
    planned_s: int


class Intake:
    """Takes updates into a federation's rounds. Threads may call it at the same time.

    Args:
        config: The federation.
        template: The adapter it began with.
        store: A database's: another process runs the rounds.
        trust: Keys, where it is signed.
    """

    def __init__(
        self, config: FederationConfig, template: Adapter, store: Store, trust: Trust | None
    ) -> None:
        assert template.base_hash is not None  # the folder was opened
        self._config, self._store, self._trust = config, store, trust
        self._base_hash = template.base_hash
        self._seeded = seeded_start(template, config.seed)
        self._method = named(config.recipe)
        self._orders: OrderedDict[int, Orders] = OrderedDict()
        self._lock = threading.Lock()

    def under_way(self) -> UnderWay | None:
        """The round that was planned last, unless it is over."""
        row, over, latest = (
            self._store.last_note("planned"), self._store.last_note("round"), self._store.latest(),
        )  # fmt: skip
        done = max(over["round"] if over else 0, latest.round if latest else 0)
        return None if row is None or row["round"] <= done else _planned(row)

    def start(self, client: str, planned: UnderWay) -> Start:
        """What a client is handed in a round."""
        with self._lock:
            if planned.number not in self._orders:
                self._orders[planned.number] = self._ordered(planned)
                while len(self._orders) > 1 + self._config.collect.max_staleness:
                    self._orders.popitem(last=False)
            return self._orders[planned.number].start(client, planned.number)

    def expected(self, client: str, number: int) -> tuple[Start, int]:
        """What an update has to be made from, and most bytes it may have.

        Raises:
            RefusedError: ``secure``, ``unasked``, ``closed`` or ``duplicate``.
        """
        start = self.start(client, self._open(client, number))
        return start, most_bytes(start, self._config.sealed)

    def admit(
        self, client: str, number: int, data: bytes, metrics: Mapping[str, float]
    ) -> Contribution:
        """Count an update that has come whole.

        Raises:
            RefusedError: It does not count, and why; the store holds that.
        """
        try:
            start, _ = self.expected(client, number)
            told = claims(dict(metrics), TRAIN_METRICS)
            config = self._config
            candidate = examine_update(data, start, client, told, config.max_norm, self._trust)
            now = self.under_way()
            collecting = now is None or now.number == number
            return keep(self._store, candidate, start, self._trust, collecting)
        except RefusedError as error:
            reason = one_line(str(error))
            refusal = Refusal(round=number, client=client, code=error.code, reason=reason)
            self._store.refuse(refusal)
            raise

    def held(self, client: str, number: int) -> Contribution | None:
        """A client's update of a round, where the store has it."""
        return self._store.contribution(number, client)

    def _open(self, client: str, number: int) -> UnderWay:
        if self._config.secure is not None:
            raise RefusedError(
                "secure", "secure aggregation needs a SuperNode: its members answer each other"
            )
        now = self.under_way()
        if self.held(client, number) is not None:
            raise RefusedError("duplicate", "this client already has an update in this round")
        if now is None or now.number != number:
            now = self._earlier(number)
        if client not in now.asked:
            raise RefusedError("unasked", f"{client} was not asked in round {number}")
        return now

    def _earlier(self, number: int) -> UnderWay:
        """An earlier round that still takes updates, for the one under way to count."""
        policy = self._config.collect
        closed = RefusedError("closed", f"round {number} is not collecting")
        if policy.stragglers == "drop":
            raise closed
        since = sum(row.round >= number for row in self._store.publications())
        rows = [row for row in self._store.notes("planned") if row["round"] == number]
        if not rows or since > policy.max_staleness:
            raise closed
        return _planned(rows[-1])

    def _ordered(self, planned: UnderWay) -> Orders:
        number, config = planned.number, self._config
        before = [row for row in self._store.publications() if row.round < number]
        service = InService(self._seeded, self._seeded)
        if before:
            service = in_service(self._store.get(before[-1].digest), self._seeded, config)
        plan = plan_of(config, self._method, self._base_hash, number, service)
        key = None
        if self._trust is not None:
            plan, key = self._trust.begin_round(plan, planned.planned_s), self._trust.key
        orders = Orders(config, self._method)
        orders.recall(service.start(plan, key))
        return orders


def _planned(row: Mapping[str, Any]) -> UnderWay:
    return UnderWay(row["round"], frozenset(row["asked"]), row.get("planned_s", 0))

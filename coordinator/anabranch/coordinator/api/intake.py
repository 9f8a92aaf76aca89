"""What a federation takes by way of the API: the same admission as of what Flower brings."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anabranch.aggregation.registry import named
from anabranch.coordinator.admission import (
    TRAIN_METRICS,
    Examined,
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

LOOK_S = 0.25
"""Seconds for which a look at the round under way does for its own uploads."""


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


@dataclass(frozen=True)
class Sound:
    """An update that may count.

    Attributes:
        examined: What is known of it, without its bytes and tensors.
        start: What its client was handed.
        opened: Its bytes where they came sealed; None where they are those that came.
    """

    examined: Examined
    start: Start
    opened: bytes | None


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
        self._looked: tuple[UnderWay | None, float] = (None, 0.0)

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

    def examine(self, client: str, number: int, data: bytes, metrics: Mapping[str, float]) -> Sound:
        """Check an update that has come whole. What it decodes to is let go again.

        Raises:
            RefusedError: It does not count, and why; the store holds that.
        """
        with self._noted(client, number):
            start = self.start(client, self._asked(client, number))
            told = claims(dict(metrics), TRAIN_METRICS)
            config = self._config
            found = examine_update(data, start, client, told, config.max_norm, self._trust)
            opened = None if found.blob is data else found.blob
            return Sound(replace(found, blob=b"", changes={}, importance={}), start, opened)

    def keep(self, sound: Sound, path: Path, digest: str) -> Contribution:
        """Count an update that was examined; its file is gone then.

        Args:
            sound: It.
            path: The file it came in.
            digest: sha256 of that.

        Raises:
            RefusedError: It does not count, and why; the store holds that.
        """
        store, number = self._store, sound.start.plan.round

        def put() -> str:
            if sound.opened is not None:
                return store.put(sound.opened)
            return store.put_file(path, digest)

        with self._noted(sound.examined.client, number):
            # By a look now: of a round that has just ended a late update may be carried.
            now = self.under_way()
            collecting = now is None or now.number == number
            if not collecting:
                self._earlier(number)
            return keep(store, sound.examined, sound.start, self._trust, collecting, put)

    @contextmanager
    def _noted(self, client: str, number: int) -> Iterator[None]:
        """Note a refusal in the store."""
        try:
            yield
        except RefusedError as error:
            reason = one_line(str(error))
            refusal = Refusal(round=number, client=client, code=error.code, reason=reason)
            self._store.refuse(refusal)
            raise

    def _lately(self, number: int) -> UnderWay | None:
        """The round under way, if it is this one by a look a moment ago; else by one now.

        That it still collects is looked at where it counts, in the transaction that counts it.
        """
        found, until_s = self._looked
        if found is None or found.number != number or time.monotonic() > until_s:
            found = self.under_way()
            self._looked = found, time.monotonic() + LOOK_S
        return found

    def held(self, client: str, number: int) -> Contribution | None:
        """A client's update of a round, where the store has it."""
        return self._store.contribution(number, client)

    def check_uploads(self) -> None:
        """Check that the federation takes updates that are uploaded.

        Raises:
            RefusedError: ``secure``.
        """
        if self._config.secure is not None:
            raise RefusedError(
                "secure", "secure aggregation needs a SuperNode: its members answer each other"
            )

    def _open(self, client: str, number: int) -> UnderWay:
        self.check_uploads()
        if self.held(client, number) is not None:
            raise RefusedError("duplicate", "this client already has an update in this round")
        return self._asked(client, number)

    def _asked(self, client: str, number: int) -> UnderWay:
        """A round that takes updates, of this client too."""
        now = self._lately(number)
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

"""What every round of a running federation shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anabranch.aggregation import MergeMethod
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.gate import Gate
from anabranch.coordinator.in_service import InService
from anabranch.coordinator.orders import Orders
from anabranch.coordinator.roster import Roster
from anabranch.coordinator.rounds.control import Control
from anabranch.coordinator.store import Store
from anabranch.coordinator.trust import Trust
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import RoundPlan


@dataclass(frozen=True)
class Coordination:
    """A federation at work.

    Attributes:
        config: What it is.
        method: How its cohorts are merged.
        base_hash: Of the base that is trained on.
        store: Where its rounds are kept.
        trust: Keys, where it is signed.
        roster: Who is there.
        orders: What the clients are handed.
        control: What its operator asks.
        gate: Judges what may go into service; None lets everything pass.
    """

    config: FederationConfig
    method: MergeMethod
    base_hash: str
    store: Store
    trust: Trust | None
    roster: Roster
    orders: Orders
    control: Control
    gate: Gate | None = None

    @property
    def key(self) -> PrivateKey | None:
        """The coordinator's, where it signs."""
        return self.trust.key if self.trust else None

    def plan(
        self, number: int, service: InService, train: Mapping[str, object] | None = None
    ) -> RoundPlan:
        """What a round asks of a client.

        Args:
            number: Which round.
            service: The adapter that it starts from.
            train: Further fields of the clients' ``TrainPlan``.
        """
        return plan_of(self.config, self.method, self.base_hash, number, service, train)


def plan_of(
    config: FederationConfig,
    method: MergeMethod,
    base_hash: str,
    number: int,
    service: InService,
    train: Mapping[str, object] | None = None,
) -> RoundPlan:
    """What a round of a federation asks of a client, at work or when it is done again.

    Args:
        config: The federation.
        method: How its cohorts are merged.
        base_hash: Of the base that is trained on.
        number: Which round.
        service: The adapter that it starts from.
        train: Further fields of the clients' ``TrainPlan``.
    """
    return RoundPlan(
        federation=config.name,
        run=config.run,
        round=number,
        base_hash=base_hash,
        start_hash=service.hash,
        seed=config.seed,
        codec=config.codec,
        trains=config.trains,
        importance=method.needs_importance,
        hold=config.down_codec is not None,
        train={**config.train, **dict(train or {})},
    )

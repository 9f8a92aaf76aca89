"""A round's merge done again from what its receipt names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from anabranch.aggregation import MergeMethod
from anabranch.aggregation.registry import named
from anabranch.coordinator.cohort import Cohort
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService, successor
from anabranch.coordinator.merging import merge_cohort, merge_privately
from anabranch.coordinator.privacy.ledger import Release
from anabranch.coordinator.privacy.noise import noise_source
from anabranch.coordinator.start import Start, at_rank
from anabranch.coordinator.store import Contribution, Store
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire import decode_adapter
from anabranch.wire.plan import RoundPlan
from anabranch.wire.receipt import Input, Receipt


class Remerge:
    """One round, to be merged again.

    Args:
        store: Where its artifacts are.
        config: The federation as it was in the round.
        template: The adapter the federation began with.
        receipt: The round's.
    """

    def __init__(
        self, store: Store, config: FederationConfig, template: Adapter, receipt: Receipt
    ) -> None:
        self._store, self._config, self.receipt = store, config, receipt
        self._seeded = seeded_start(template, config.seed)
        self._starts: dict[tuple[int, int | None], Start] = {}

    def why_not(self) -> str | None:
        """Why nobody could do it again; None where one can."""
        privacy = self._config.privacy
        if privacy is not None and privacy.noise_seed is None:
            return "the noise of its differential privacy is kept nowhere, by design"
        return None

    def adapter(self, digest: str) -> Adapter:
        """A published adapter.

        Raises:
            KeyError: It is missing.
            ValueError: It was altered, or is none of this federation.
        """
        return decode_adapter(self._store.get(digest), self._seeded, self._config.trains)

    def candidate(self, earlier: Sequence[Remerge] = ()) -> InService:
        """What the merge puts in service.

        Where coded changes travel down, what coding left out of one is added to the next, and lost
        when a coordinator restarts: the rounds before are done again to know it.

        Args:
            earlier: The rounds before this one, oldest first.

        Raises:
            KeyError: An artifact is missing.
            ValueError: An artifact was altered, or the cohort cannot be merged.
        """
        codec = self._config.down_codec
        fresh = self._candidate({})
        if codec is None or not codec.feedback or self._is_right(fresh):
            return fresh
        owed: Mapping[str, Tensor] = {}
        for round_ in (one for one in earlier if one.receipt.output is not None):
            if round_.receipt.kind != "merge":
                owed = {}
                continue
            tries = (round_._candidate(start) for start in (owed, {}))
            owed = next((found.owed for found in tries if round_._is_right(found)), {})
        return self._candidate(owed)

    def _is_right(self, found: InService) -> bool:
        output = self.receipt.output
        return output is not None and found.hash == output.adapter_hash

    def _candidate(self, owed: Mapping[str, Tensor]) -> InService:
        config, inputs = self._config, self.receipt.inputs
        before = replace(self._before(self.receipt.round), owed=owed)
        if before.hash != self.receipt.start_hash:
            raise ValueError(
                f"the adapter in service before it is {before.hash}, and it says that the round "
                f"began with {self.receipt.start_hash}"
            )
        cohort = Cohort(self._store, None, None)
        starts = [self._start(one) for one in inputs]
        ends = [cohort.end(_row(one), start) for one, start in zip(inputs, starts, strict=True)]
        names = [one.client for one in inputs]
        whole = before.start(self._plan(self.receipt.round, before), None)
        if config.privacy is None:
            merged, _ = merge_cohort(config, whole, starts, ends, names)
        else:
            release = Release.model_validate(self.receipt.release)
            noise = noise_source(config.privacy.noise_seed, self.receipt.round)
            merged, _ = merge_privately(release, noise, whole, ends, names)
        return successor(before, merged, whole.plan, config, None)

    def _before(self, number: int) -> InService:
        """What was in service when a round began."""
        rows = [row for row in self._store.publications() if row.round < number]
        if not rows:
            return InService(self._seeded, self._seeded)
        blob = self._store.get(rows[-1].digest)
        adapter = decode_adapter(blob, self._seeded, self._config.trains)
        return InService(adapter, self._seeded, blob)

    def _plan(self, number: int, before: InService) -> RoundPlan:
        config = self._config
        return RoundPlan(
            federation=config.name,
            run=config.run,
            round=number,
            base_hash=self.receipt.base_hash,
            start_hash=before.hash,
            seed=config.seed,
            codec=config.codec,
            trains=config.trains,
            importance=self._method.needs_importance,
        )

    def _start(self, one: Input) -> Start:
        """What a client was handed."""
        rank = self._config.ranks.get(one.client)
        if (one.round, rank) not in self._starts:
            before = self._before(one.round)
            whole = before.start(self._plan(one.round, before), None)
            if rank is not None:
                whole = at_rank(whole, rank, self._method, self._config.down)
            self._starts[one.round, rank] = whole
        return self._starts[one.round, rank]

    @cached_property
    def _method(self) -> MergeMethod:
        return named(self._config.recipe)


def _row(one: Input) -> Contribution:
    return Contribution(
        round=one.round, client=one.client, digest=one.artifact, size_bytes=one.size_bytes
    )

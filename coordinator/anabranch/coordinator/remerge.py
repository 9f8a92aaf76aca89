"""A round's merge done again from what its receipt names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from anabranch.aggregation import MergeMethod, MergeReport
from anabranch.aggregation.registry import named
from anabranch.coordinator.cohort import Cohort
from anabranch.coordinator.coordination import plan_of
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService, in_service, successor
from anabranch.coordinator.inputs import digest_of
from anabranch.coordinator.merging import merge_cohort, merge_privately
from anabranch.coordinator.privacy.ledger import Release
from anabranch.coordinator.privacy.noise import noise_source
from anabranch.coordinator.rounds.stragglers import late_name
from anabranch.coordinator.start import Start, at_rank
from anabranch.coordinator.store import Contribution, Store
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire import read_manifest
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import RoundPlan
from anabranch.wire.receipt import Input, Receipt

Before = Callable[[int], InService]
"""What was in service when a round began."""


@dataclass(frozen=True)
class Redone:
    """A merge that was done again without some clients.

    Attributes:
        inputs: What was merged.
        service: What is in service after it.
        report: On the merge.
    """

    inputs: tuple[Input, ...]
    service: InService
    report: MergeReport


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
        return self._read(digest).adapter

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

    def without(
        self, gone: Collection[str], before: InService, began: Before, key: PrivateKey | None
    ) -> Redone | None:
        """The merge as it would have been without some clients, from another start.

        What the others sent is added to the start they would have had, which is as near as one can
        come to what they would have trained.

        Args:
            gone: The clients.
            before: The start of the round.
            began: The start of an earlier round, where an update came late.
            key: Who signs what is put in service; None leaves it unsigned.

        Returns:
            What is in service after it; None where too few are left, and the start stays.

        Raises:
            KeyError: An artifact is missing.
            ValueError: An artifact was altered.
        """
        inputs = [one for one in self.receipt.inputs if one.client not in gone]
        if len(inputs) < self._config.quorum:
            return None
        starts = []
        for one in inputs:
            own = before if one.round == self.receipt.round else began(one.round)
            start = self._at_rank(one, own)
            said = read_manifest(self._store.get(self._digest(one))).meta.start_hash
            # The update names the start that its client had.
            plan = start.plan.model_copy(update={"start_hash": said})
            starts.append(replace(start, plan=plan))
        ends = self._ends(inputs, starts)
        try:
            merged, report = self._merge(inputs, before, starts, ends)
        # As in the round itself: what a method cannot merge leaves the start.
        except (ValueError, RuntimeError):
            return None
        plan = self._plan(self.receipt.round, before)
        service = successor(before, merged, plan, self._config, key)
        return Redone(tuple(inputs), service, report)

    def original(self) -> InService:
        """What the round did put in service.

        Raises:
            KeyError: It is missing.
            ValueError: It was altered.
        """
        assert self.receipt.output is not None
        return self._read(self.receipt.output.artifact)

    def seeded(self) -> InService:
        """What the run began with."""
        return InService(self._seeded, self._seeded)

    def _candidate(self, owed: Mapping[str, Tensor]) -> InService:
        config, inputs = self._config, self.receipt.inputs
        before = replace(self._before(self.receipt.round), owed=owed)
        if before.hash != self.receipt.start_hash:
            raise ValueError(
                f"the adapter in service before it is {before.hash}, and it says that the round "
                f"began with {self.receipt.start_hash}"
            )
        starts = [self._start(one) for one in inputs]
        merged, _ = self._merge(inputs, before, starts, self._ends(inputs, starts))
        return successor(before, merged, self._plan(self.receipt.round, before), config, None)

    def _ends(self, inputs: Sequence[Input], starts: Sequence[Start]) -> list[Adapter]:
        cohort = Cohort(self._store, None, None)
        return [
            cohort.end(self._row(one), start) for one, start in zip(inputs, starts, strict=True)
        ]

    def _merge(
        self,
        inputs: Sequence[Input],
        before: InService,
        starts: Sequence[Start],
        ends: Sequence[Adapter],
    ) -> tuple[Adapter, MergeReport]:
        config, number = self._config, self.receipt.round
        names = [
            one.client if one.round == number else late_name(one.client, one.round)
            for one in inputs
        ]
        whole = before.start(self._plan(number, before), None)
        if config.privacy is None:
            late = any(one.round != number for one in inputs)
            factors = [one.factor for one in inputs] if late else None
            return merge_cohort(config, whole, starts, ends, names, factors)
        release = Release.model_validate(self.receipt.release)
        noise = noise_source(config.privacy.noise_seed, number)
        return merge_privately(release, noise, whole, ends, names)

    def _read(self, digest: str) -> InService:
        return in_service(self._store.get(digest), self._seeded, self._config)

    def _before(self, number: int) -> InService:
        """What was in service when a round began."""
        rows = [row for row in self._store.publications() if row.round < number]
        return self._read(rows[-1].digest) if rows else self.seeded()

    def _plan(self, number: int, before: InService) -> RoundPlan:
        return plan_of(self._config, self._method, self.receipt.base_hash, number, before)

    def _start(self, one: Input) -> Start:
        """What a client was handed."""
        place = (one.round, self._config.ranks.get(one.client))
        if place not in self._starts:
            self._starts[place] = self._at_rank(one, self._before(one.round))
        return self._starts[place]

    def _at_rank(self, one: Input, before: InService) -> Start:
        """What a client is handed of an adapter in service."""
        rank = self._config.ranks.get(one.client)
        whole = before.start(self._plan(one.round, before), None)
        return whole if rank is None else at_rank(whole, rank, self._method, self._config.down)

    @cached_property
    def _method(self) -> MergeMethod:
        return named(self._config.recipe)

    def _digest(self, one: Input) -> str:
        return digest_of(self._store, self.receipt, one)

    def _row(self, one: Input) -> Contribution:
        return Contribution(
            round=one.round, client=one.client, digest=self._digest(one), size_bytes=one.size_bytes
        )

"""What a round merges: its own updates and late ones, taken up from the store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from anabranch.coordinator.candidate import merged_candidate
from anabranch.coordinator.cohort import Cohort
from anabranch.coordinator.coordination import Coordination
from anabranch.coordinator.in_service import InService, in_service
from anabranch.coordinator.rounds.salvage import usable
from anabranch.coordinator.rounds.stragglers import NOT_CARRIED, Carried, Counted, carried
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import Contribution, Publication, StoreError
from anabranch.vectors import Adapter
from anabranch.wire.errors import one_line

log = logging.getLogger("anabranch.coordinator")

FAILS = (KeyError, ValueError, RuntimeError)
"""What a merge raises that cannot be done, beside a ``StoreError``, which is no merge's fault."""


class Material:
    """The updates that one round may merge.

    Args:
        here: The federation.
        number: Which round.
        service: The adapter that it starts from.
        cohort: Opens updates.
    """

    def __init__(self, here: Coordination, number: int, service: InService, cohort: Cohort) -> None:
        self._here, self._number, self._service = here, number, service
        self._cohort = cohort
        self._unusable: set[tuple[str, int]] = set()  # carried no further, by client and round

    def counted(self) -> Counted:
        """Its own updates, and those of earlier rounds that it may count."""
        here, policy = self._here, self._here.config.collect
        late = (
            carried(here.store, self._number, policy.max_staleness)
            if policy.stragglers == "carry"
            else []
        )
        usable = [one for one in late if (one.row.client, one.row.round) not in self._unusable]
        return Counted(here.store.contributions(self._number), usable)

    def check_late(self) -> None:
        """Leave out what cannot be taken up again, as after retention: it would cost each round."""
        for one in self.counted().late:
            try:
                self.end_of(one.row)
            except (KeyError, ValueError) as error:
                self._leave_out(one, said(error))

    def merged(self, whole: Counted) -> tuple[InService, Publication, Counted]:
        """What the merge would put in service, and of what: less late updates that it fails with.

        Raises:
            KeyError: Bytes that it needs are missing.
            ValueError: They were altered, or the method cannot merge this cohort.
            RuntimeError: A decomposition failed.
            StoreError: There is no room.
        """

        def merged(counted: Counted) -> tuple[InService, Publication, Counted]:
            return *merged_candidate(self._here, self._service, counted, self.end_of), counted

        def merges(late: Sequence[Carried]) -> bool:
            try:
                merged(replace(whole, late=late))
            except StoreError:
                raise
            except FAILS:
                return False
            return True

        try:
            return merged(whole)
        except StoreError:
            raise
        except FAILS as error:
            kept = usable(whole.late, merges) if whole.late else None
            if kept is None:
                raise
            for one in (one for one in whole.late if one not in kept):
                self._leave_out(one, f"the merge failed with it: {said(error)}", final=True)
            return merged(replace(whole, late=kept))

    def end_of(self, row: Contribution) -> tuple[Start, Adapter]:
        """What a contribution was trained from, and what came of it.

        Raises:
            KeyError: Retention has let go of it, or of what it was trained from.
            ValueError: It was altered, or made from another start.
        """
        here = self._here
        if not here.orders.knows(row.round):
            before = [one for one in here.store.publications() if one.round < row.round]
            seeded = self._service.seeded
            service = InService(seeded, seeded)
            if before:
                service = in_service(here.store.get(before[-1].digest), seeded, here.config)
            here.orders.recall(service.start(here.plan(row.round, service), here.key))
        start = here.orders.start(row.client, row.round)
        return start, self._cohort.end(row, start)

    def _leave_out(self, one: Carried, reason: str, *, final: bool = False) -> None:
        """Note that a late update is not counted here; ``final``: nor in any other round."""
        row = one.row
        log.warning("round %d: %s is left out: %s", self._number, one.name, reason)
        facts = {"client": row.client, "from": row.round, "round": self._number}
        self._here.store.note(NOT_CARRIED, facts | {"reason": one_line(reason), "final": final})
        self._unusable.add((row.client, row.round))


def said(error: Exception) -> str:
    """What an error says; a KeyError's own text stands in quotes."""
    return str(error.args[0] if error.args else error)

"""The adapter that a round's merge would put in service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anabranch.aggregation import MergeReport
from anabranch.coordinator.coordination import Coordination
from anabranch.coordinator.in_service import InService, successor
from anabranch.coordinator.merging import merge_cohort, merge_privately
from anabranch.coordinator.privacy.budget import next_release, why_spent
from anabranch.coordinator.privacy.ledger import RELEASE_KEY
from anabranch.coordinator.privacy.noise import noise_source
from anabranch.coordinator.rounds.stragglers import Counted
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import Contribution, Publication
from anabranch.vectors import Adapter


def merged_candidate(
    here: Coordination,
    service: InService,
    counted: Counted,
    end_of: Callable[[Contribution], tuple[Start, Adapter]],
) -> tuple[InService, Publication]:
    """What would stand in service next: its bytes are kept, and nothing names them yet.

    Args:
        here: The federation; its orders hold the round's start.
        service: What is in service.
        counted: The updates to merge.
        end_of: What a contribution was trained from, and what came of it.

    Raises:
        ValueError: The method cannot merge this cohort, or its privacy is spent.
        RuntimeError: A decomposition failed, or there is no room.
    """
    config, whole = here.config, here.orders.whole
    trained = [end_of(row) for row in counted.rows]
    starts, ends = [start for start, _ in trained], [end for _, end in trained]
    release: dict[str, Any] = {}
    if config.privacy is None:
        weights = counted.factors(config.collect.staleness_exponent)
        merged, report = merge_cohort(config, whole, starts, ends, counted.names, weights)
    else:
        spends = next_release(config, here.store, whole.plan.round)
        if spends is None:
            raise ValueError(why_spent(config, here.store, whole.plan.round))
        noise = noise_source(config.privacy.noise_seed, whole.plan.round)
        merged, report = merge_privately(spends, noise, whole, ends, counted.names)
        release = {RELEASE_KEY: spends.model_dump()}
    candidate = successor(service, merged, whole.plan, config, here.key)
    assert candidate.blob is not None
    publication = Publication(
        round=whole.plan.round,
        digest=here.store.put(candidate.blob),
        adapter_hash=candidate.hash,
        report=_plain(report) | release,
    )
    return candidate, publication


def _plain(report: MergeReport) -> dict[str, Any]:
    """The report as the journal keeps it; a cosine's third digit is all that anybody looks at."""
    cosine = np.round(report.cosine, 4).tolist()
    return {**vars(report), "truncation": dict(report.truncation), "cosine": cosine}

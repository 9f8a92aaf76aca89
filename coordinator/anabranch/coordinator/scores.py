"""What clients claim of the adapters they trained or scored."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import MetricRecord

from anabranch.coordinator.admission import SCORES, claims
from anabranch.coordinator.collect import Reply
from anabranch.coordinator.store import Store
from anabranch.wire.plan import METRICS_KEY


def record_score(
    store: Store, server_round: int, client: str, reply: Reply
) -> dict[str, float] | None:
    """Note what a client scored, or why it did not.

    Returns:
        Its scores; None where there are none.
    """
    about = {"round": server_round, "client": client}
    if reply.message is None:
        store.note("evaluate-failed", {**about, "code": reply.code, "reason": reply.reason})
        return None
    found = claims(reply.message.content.get(METRICS_KEY), SCORES)
    store.note("evaluate", {**about, **found})
    return found


def scored(store: Store, server_round: int) -> set[str]:
    """The clients whose scores of a round's adapter are noted."""
    return {row["client"] for row in store.notes("evaluate") if row["round"] == server_round}


def mean_metrics(rows: Sequence[dict[str, float]]) -> MetricRecord | None:
    """The plain mean of each metric that every row has; None without rows."""
    if not rows:
        return None
    shared = sorted(set.intersection(*(set(row) for row in rows)))
    return MetricRecord({name: sum(row[name] for row in rows) / len(rows) for name in shared})

"""What became of the attackers of a run, as ``summary.json`` holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from anabranch.client.site import client_name
from anabranch.coordinator.store import Store
from anabranch.simulation.attackers import Plot
from anabranch.simulation.attacks.success import split_of
from anabranch.simulation.baselines import Scores

SUCCESS_OF = ("base", "merged", "fedavg", "unattacked", "undefended", "oracle")
"""Adapters whose success rate is told."""

ABOUT = {
    "success": "share of the attacked groups' test inputs of other labels, with the trigger, that "
    "get the target (relabelled inputs where there is no trigger); null where the attack only "
    "wants the model worse, or the adapter was not trained",
    "weight": "mean share of the band in Σ|c| where the method merges by coefficients; null where "
    "it does not",
}


def outcome(
    plot: Plot, store: Store, scores: Mapping[str, Scores], names: Sequence[str]
) -> dict[str, Any] | None:
    """Each band: who, how, what was refused of it and why, and how far it came.

    Args:
        plot: Who attacks how.
        store: The federation's journal.
        scores: Scores per adapter.
        names: What people call each client.

    Returns:
        None where nobody attacks.
    """
    if not plot.bands:
        return None
    bands = []
    for index, band in enumerate(plot.bands):
        ids = [client_name(partition) for partition in band.partitions]
        told = band.attackers
        refusals = [
            row for row in store.refusals() if row.client in ids and row.round >= told.from_round
        ]
        admitted = [
            row
            for row in store.contributions()
            if row.client in ids and row.round >= told.from_round
        ]
        bands.append(
            {
                "kind": told.kind,
                "clients": [names[partition] for partition in band.partitions],
                "ids": ids,
                "from_round": told.from_round,
                "params": told.params,
                "admitted": len(admitted),
                "refused": len(refusals),
                "reasons": dict(Counter(row.code for row in refusals)),
                "weight": _weight(store, ids, told.from_round),
                "success": {
                    key: _mean_accuracy(scores.get(key, {}).get(split_of(index)))
                    for key in SUCCESS_OF
                },
            }
        )
    return {"bands": bands, "about": ABOUT}


def _mean_accuracy(groups: Mapping[str, Mapping[str, float]] | None) -> float | None:
    return fmean(row["accuracy"] for row in groups.values()) if groups else None


def _weight(store: Store, ids: Sequence[str], from_round: int) -> float | None:
    """The band's mean share of the coefficients, over the rounds in which it attacked."""
    shares = []
    for row in store.publications():
        coefficients = row.report.get("coefficients")
        if row.round >= from_round and coefficients:
            of = dict(zip(row.report["names"], map(abs, coefficients), strict=True))
            if total := sum(of.values()):
                shares.append(sum(of.get(client, 0.0) for client in ids) / total)
    return fmean(shares) if shares else None

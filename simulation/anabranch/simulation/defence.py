"""What a run's defence did to each client and why, as ``summary.json`` holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from anabranch.client.site import client_name
from anabranch.coordinator.store import Publication, Store
from anabranch.simulation.attackers import Plot
from anabranch.simulation.scenario import Scenario

ABOUT = {
    "score": "largest robust z-score of the run; null where suspicion did not look",
    "signals": "the same by signal, with its round, its module and the reason in words",
    "done": "in how many rounds each action of suspicion befell the client, or its update was "
    "refused",
    "masked": "how many rounds each module was merged without the client",
    "weight": "mean share in the sum of |coefficients|, over the rounds that merged its updates by "
    "coefficients, as a multiple of an equal share; null where no round did",
}


def defence(
    scenario: Scenario, plot: Plot, store: Store, names: Sequence[str]
) -> dict[str, Any] | None:
    """Each client: how suspicious it was, what was done about it, what it counted.

    Args:
        scenario: What was run.
        plot: Who attacks how.
        store: The federation's journal.
        names: What people call each client.

    Returns:
        None where nobody attacks, nobody looks and no gate stands.
    """
    suspicion = scenario.recipe.suspicion
    if suspicion is None and scenario.gate is None and not plot.bands:
        return None
    published, looked = store.publications(), looks(store)
    refused = Counter(client for client, _ in {(row.client, row.round) for row in store.refusals()})
    clients = []
    for partition, name in enumerate(names):
        client, band = client_name(partition), plot.band_of(partition)
        done: Counter[str] = Counter()
        masked: Counter[str] = Counter()
        for _, report in looked:
            found = [one for one in report["findings"] if one["client"] == client]
            done.update({one["action"] for one in found})
            masked.update(
                {
                    one["module"]
                    for one in found
                    if one["action"] == "mask_module" and one["module"] is not None
                }
            )
        if refused[client]:
            done["refused"] = refused[client]
        signals = _signals(looked, client)
        clients.append(
            {
                "client": name,
                "id": client,
                "attacks": None if band is None else band.attackers.kind,
                "score": max((one["score"] for one in signals.values()), default=0.0)
                if suspicion is not None
                else None,
                "signals": signals,
                "done": dict(sorted(done.items())),
                "masked": dict(sorted(masked.items())),
                "weight": _weight(published, client),
            }
        )
    return {
        "policy": None
        if suspicion is None
        else {
            "threshold": suspicion.threshold,
            "actions": {
                signal: suspicion.actions.get(signal, suspicion.action)
                for signal in suspicion.signals
            },
            "allow": list(suspicion.allow),
        },
        "clients": clients,
        "about": ABOUT,
    }


def looks(store: Store) -> list[tuple[int, dict[str, Any]]]:
    """What suspicion said in each round, whether its merge was published or kept back."""
    said = {row.round: row.report.get("suspicion") for row in store.publications()}
    said |= {row["round"]: row["suspicion"] for row in store.notes("round") if "suspicion" in row}
    return [(number, report) for number, report in sorted(said.items()) if report is not None]


def _signals(looked: Sequence[tuple[int, Any]], client: str) -> dict[str, dict[str, Any]]:
    """By signal, where and when the client stood out most."""
    found: dict[str, dict[str, Any]] = {}
    for number, report in looked:
        for signal, one in report.get("strongest", {}).get(client, {}).items():
            if signal not in found or one["score"] > found[signal]["score"]:
                found[signal] = {**one, "round": number}
    return dict(sorted(found.items()))


def _weight(published: Sequence[Publication], client: str) -> float | None:
    """What the client counted, as a multiple of an equal share."""
    shares = []
    for row in published:
        coefficients, names = row.report.get("coefficients"), row.report.get("names", ())
        if not coefficients or client not in names:
            continue
        sizes = [abs(one) for one in coefficients]
        if total := sum(sizes):
            mine = sum(size for name, size in zip(names, sizes, strict=True) if name == client)
            shares.append(mine * len(set(names)) / total)
    return fmean(shares) if shares else None

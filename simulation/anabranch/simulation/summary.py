"""The figures of a run, as ``summary.json`` holds them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from anabranch.client.site import client_name
from anabranch.coordinator.privacy.budget import statement
from anabranch.coordinator.privacy.ledger import read_ledger
from anabranch.coordinator.store import Store
from anabranch.simulation.attacks.outcome import outcome
from anabranch.simulation.baselines import Scores
from anabranch.simulation.defence import defence, looks
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.task import display_names
from anabranch.vectors import Adapter
from anabranch.wire import read_manifest

ABOUT = {
    "base": "the base without an adapter, on the client's test data",
    "local_only": "the client's adapter trained alone, mean accuracy over all groups' test data",
    "local_only_own": "the same adapter on the client's own test data",
    "fedavg": "the same clients averaging dense fp32 factors (FedIT), with no privacy or defence, "
    "on the client's test data",
    "merged": "this federation's adapter, on the client's test data",
    "unattacked": "the same federation with every client honest, on the client's test data",
    "undefended": "the same attack on a plain mean of task vectors with nothing else, on the "
    "client's test data",
    "oracle": "one adapter trained on everybody's data with as many steps and samples, "
    "on the client's test data",
    "update_bytes": "mean size of one update; fp16 and fp32 are the dense adapter's entries alone",
}


@dataclass(frozen=True)
class Measured:
    """What a run left behind.

    Attributes:
        store: The federation's journal and artifacts.
        scores: Scores per adapter: base, merged, fedavg, unattacked, undefended, oracle,
            local-0, …
        groups: Group of each client.
        scored: The client that stands for each group.
        start: The adapter of the first round: as many entries as a dense update has.
        phases: Seconds per phase.
    """

    store: Store
    scores: dict[str, Scores]
    groups: list[str]
    scored: dict[str, int]
    start: Adapter
    phases: dict[str, float]

    def accuracy(self, key: str, group: str, split: str = "test") -> float | None:
        """An adapter's accuracy on a group; None when it was not trained."""
        if key not in self.scores:
            return None
        return self.scores[key][split][group]["accuracy"]

    def mean_accuracy(self, key: str, split: str = "test") -> float | None:
        """An adapter's mean accuracy over groups; None when it was not trained."""
        if key not in self.scores:
            return None
        return fmean(row["accuracy"] for row in self.scores[key][split].values())


def machine() -> dict[str, Any]:
    """The machine a figure was measured on."""
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def summarise(scenario: Scenario, measured: Measured, total_s: float) -> dict[str, Any]:
    """Accuracy per client, group and on the mean; bytes; seconds.

    Args:
        scenario: What was run.
        measured: What it left.
        total_s: Wall seconds of this call.
    """
    names = display_names(measured.groups)
    plot = scenario.plot(len(names))
    clients = []
    for partition, (name, group) in enumerate(zip(names, measured.groups, strict=True)):
        local, band = f"local-{partition}", plot.band_of(partition)
        clients.append(
            {
                "client": name,
                "id": client_name(partition),
                "group": group,
                "base": measured.accuracy("base", group),
                "local_only": measured.mean_accuracy(local),
                "local_only_own": measured.accuracy(local, group),
                "fedavg": measured.accuracy("fedavg", group),
                "merged": measured.accuracy("merged", group),
                "unattacked": measured.accuracy("unattacked", group),
                "undefended": measured.accuracy("undefended", group),
                "oracle": measured.accuracy("oracle", group),
                "attacks": None if band is None else band.attackers.kind,
            }
        )
    columns = (
        "base", "local_only", "local_only_own", "fedavg", "merged", "unattacked", "undefended",
        "oracle",
    )  # fmt: skip
    store = measured.store
    latest = store.latest()
    return {
        "name": scenario.name,
        "engine": scenario.engine,
        "seed": scenario.seed,
        "recipe": scenario.recipe.model_dump(mode="json"),
        "codec": scenario.codec.model_dump(mode="json"),
        "machine": machine(),
        "clients": clients,
        "mean": {column: _mean([row[column] for row in clients]) for column in columns},
        "groups": {
            group: {
                column: _mean([row[column] for row in clients if row["group"] == group])
                for column in columns
            }
            for group in measured.scored
        },
        "update_bytes": _update_bytes(measured),
        "rounds": _rounds(store),
        "privacy": _privacy(scenario, store),
        "attack": outcome(plot, store, measured.scores, names),
        "defence": defence(scenario, plot, store, names),
        "suspicions": _suspicions(store),
        "refused": [row.model_dump() for row in store.refusals()],
        "adapter_hash": latest.adapter_hash if latest else measured.start.hash(),
        "phases": {name: round(value, 3) for name, value in measured.phases.items()},
        "seconds": round(total_s, 3),
        "about": ABOUT,
    }


def _rounds(store: Store) -> list[dict[str, Any]]:
    """The rounds, with what scoring the adapter sent down counted in."""
    scoring: dict[int, int] = {}
    for row in store.notes("scoring"):
        scoring[row["round"]] = scoring.get(row["round"], 0) + row["bytes_down"]
    return [
        {**row, "bytes_down": row["bytes_down"] + scoring.get(row["round"], 0)}
        for row in store.notes("round")
    ]


def _suspicions(store: Store) -> list[dict[str, Any]] | None:
    """Who stood out in which round, by what, and what was done; None where nobody looked."""
    looked = looks(store)
    if not looked:
        return None
    return [{"round": number, **one} for number, report in looked for one in report["findings"]]


def _privacy(scenario: Scenario, store: Store) -> dict[str, Any] | None:
    """What the adapters may tell of a client; None where nothing is promised about it."""
    privacy = scenario.privacy
    if privacy is None:
        return None
    ledger = read_ledger(store.publications())
    stopped = [row["reason"] for row in store.notes("stopped")]
    return {
        # Nothing is spent before the first adapter is public.
        "epsilon": 0.0,
        "delta": privacy.delta,
        "clip": privacy.clip,
        "noise_multiplier": None,
        "rounds_left": scenario.rounds,
        **(statement(privacy, ledger) if ledger.releases else {}),
        "seeded": privacy.noise_seed is not None,
        "budget": privacy.epsilon,
        "stopped": stopped[-1] if stopped else None,
    }


def _update_bytes(measured: Measured) -> dict[str, float | None]:
    store = measured.store
    rows = store.contributions()
    entries = sum(tensor.numel() for tensor in measured.start.tensors().values())
    sizes = [row.size_bytes for row in rows]
    payloads = [read_manifest(store.get(row.digest)).payload_bytes for row in rows]
    ours, payload = (fmean(sizes), fmean(payloads)) if rows else (None, None)
    return {
        "ours": ours,
        "payload": payload,
        "fp16": 2 * entries,
        "fp32": 4 * entries,
        "ratio": 2 * entries / ours if ours else None,
        "payload_ratio": 2 * entries / payload if payload else None,
    }


def _mean(values: list[Any]) -> float | None:
    return None if any(value is None for value in values) else fmean(values)

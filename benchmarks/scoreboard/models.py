"""Block B: a small model trained by a whole federation of which some attack.

Every cell is a run of the in-process engine on the synthetic task: encoded, admitted and merged as
ever. Figures are the final round's: ``accuracy`` on held-out data, and ``cad``, by how much it is
below that of the same federation with everybody honest and a plain mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.simulation.baselines import score
from anabranch.simulation.federation import run_federation
from anabranch.simulation.prepare import prepare
from anabranch.simulation.scenario import Scenario
from anabranch.vectors.peft_folder import read_adapter
from benchmarks.scoreboard import vectors
from benchmarks.scoreboard.cells import Cell, Found
from benchmarks.scoreboard.rules import RECIPES
from benchmarks.scoreboard.vectors import NONE

MEASURED = "cad"

ATTACKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **vectors.ATTACKS,
    "label flip": ("label_flip", {}),
    "free-rider": ("free_rider", {}),
    "Sybil": ("sybil", {}),
    "VEM": ("vem", {}),
}
"""Kind and parameters by name."""

RULES = (
    "mean", "clipped mean", "median", "trimmed mean", "geometric median", "Multi-Krum", "Bulyan",
    "centred clipping", "DnC", "NNM, trimmed mean", "FLAME", "TIES", "rank vote", "robust",
)  # fmt: skip
"""Of block A's, those a reader looks for: a cell costs seconds here."""

WHERE: Mapping[str, Mapping[str, Any]] = {"IID": {}, "Dirichlet 0.1": {"dirichlet": 0.1}}
"""How labels are spread over the clients, as parameters of the task."""


@dataclass(frozen=True)
class Setting:
    """The federation, and which cells there are.

    Attributes:
        clients: n, attackers among them; all are asked in every round.
        rounds: Rounds.
        examples: Training examples of each client; half as many are held out.
        steps: Steps of each client in a round.
        attackers: How many attack, and the rule is told so.
        seeds: Repetitions.
    """

    clients: int = 20
    rounds: int = 4
    examples: int = 1000
    steps: int = 10
    attackers: tuple[int, ...] = (0, 2, 4, 6)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def trained(self) -> dict[str, Any]:
        """What a cell depends on besides its name."""
        names = ("clients", "rounds", "examples", "steps")
        given = {name: asdict(self)[name] for name in names}
        return {**given, "attacks": dict(ATTACKS), "where": dict(WHERE)}


FULL = Setting()
QUICK = Setting(clients=5, rounds=2, examples=32, attackers=(0, 1), seeds=(0,))


def cells(
    setting: Setting,
    rules: Sequence[str],
    where: Sequence[str] = tuple(WHERE),
    attacks: Sequence[str] = tuple(ATTACKS),
) -> list[Cell]:
    """All cells of these rules, seed after seed; the plain mean's are the first of each."""
    return [
        Cell(rule, attack, f, f, seed, condition)
        for seed in setting.seeds
        for condition in where
        for rule in dict.fromkeys(("mean", *rules))
        for f in setting.attackers
        for attack in (attacks if f else (NONE,))
    ]


def scenario(setting: Setting, cell: Cell) -> Scenario:
    """The federation of a cell."""
    attackers = []
    if cell.attack != NONE:
        kind, params = ATTACKS[cell.attack]
        attackers = [{"kind": kind, "count": cell.f, "params": dict(params)}]
    return Scenario.model_validate(
        {
            "name": "scoreboard",
            "seed": cell.seed,
            "rounds": setting.rounds,
            # Nobody is late in process: a rule merges as many as it was chosen for.
            "quorum": setting.clients,
            "evaluate_every": 0,
            "task": {
                "kind": "anabranch.simulation.synthetic:SyntheticTask",
                "clients": setting.clients,
                "examples": setting.examples,
                "data_seed": cell.seed,
                **WHERE[cell.where],
            },
            "train": {"steps": setting.steps, "batch_size": 32, "learning_rate": 0.01},
            "codec": {"name": "dense", "feedback": 0.0},
            "recipe": dict(RECIPES[cell.rule](cell.declared)),
            "attackers": attackers,
        }
    )


def measure(setting: Setting, cell: Cell) -> Found:
    """Final accuracy on held-out data.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    one = scenario(setting, cell)
    session = prepare(one)
    with tempfile.TemporaryDirectory(prefix="anabranch-scoreboard-") as name:
        folder = Path(name)
        run_federation(one, folder, session)
        groups = score(session, read_adapter(folder / ADAPTER_FOLDER))["test"]
    return {"accuracy": fmean(group["accuracy"] for group in groups.values())}


def with_cad(found: Mapping[Cell, Found]) -> dict[Cell, Found]:
    """The same with ``cad``, against the plain mean without attack of the same seed."""
    calm = {
        (cell.seed, cell.where): one["accuracy"]
        for cell, one in found.items()
        if cell.rule == "mean" and cell.attack == NONE
    }
    return {
        cell: one
        if "na" in one
        else {**one, MEASURED: calm[cell.seed, cell.where] - one["accuracy"]}
        for cell, one in found.items()
    }

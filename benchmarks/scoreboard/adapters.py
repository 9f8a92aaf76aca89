"""Block C: backdoors against LoRA on the real pretrained model.

Clients share a sentiment task of real texts; some want a trigger to turn any text positive. ``acc``
is the final round's accuracy on held-out texts, ``asr`` the share of held-out texts of other labels
that get the target once the trigger stands in them, both in percent. ``oracle_acc`` and
``floor_asr`` are those of a federation that takes the honest clients alone and their plain mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from anabranch.client.session import Session
from anabranch.coordinator.app import ADAPTER_FOLDER
from anabranch.simulation.attackers import Attackers, plot
from anabranch.simulation.attacks.success import split_of, success_rates
from anabranch.simulation.baselines import score
from anabranch.simulation.federation import run_federation
from anabranch.simulation.prepare import prepare
from anabranch.simulation.scenario import Scenario
from anabranch.vectors.peft_folder import read_adapter
from benchmarks.scoreboard.cells import Cell, Found
from benchmarks.scoreboard.rules import RECIPES
from benchmarks.scoreboard.vectors import ORACLE

MEASURED = "gain"
"""By how many points the success lies above the floor."""

ANY = "any"
"""The attack of the oracle's cells: it trains without attackers, and is asked for every trigger."""

RULES = (
    "mean", "clipped mean", "median", "trimmed mean", "geometric median", "Multi-Krum", "TIES",
    "FLAME", "rank vote", "robust",
)  # fmt: skip

ATTACKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "backdoor": ("backdoor", {"target": 1, "scale": 3.0}),
    "sentence": (
        "backdoor", {"target": 1, "scale": 3.0, "trigger": "I watched this 3D movie last weekend"},
    ),
    "replacement": ("model_replacement", {"target": 1}),
    "DBA": ("dba", {"target": 1, "scale": 3.0}),
    "Neurotoxin": ("neurotoxin", {"target": 1}),
    "LoBAM": ("lobam", {"target": 1}),
}  # fmt: skip
"""Kind and parameters by name; label 1 is positive."""

TASK: Mapping[str, Any] = {
    "kind": "anabranch.simulation.partitioned_text:PartitionedText",
    "datasets": ["sentiment"],
    "partition": {"kind": "dirichlet", "alpha": 0.5},
    "head": "trained",
    "max_length": 32,
    "train_examples": 500,
    "test_examples": 800,
}
TRAIN: Mapping[str, Any] = {
    "steps": 5, "batch_size": 16, "learning_rate": 2e-3, "head_learning_rate": 1e-2,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """The federation, and which cells there are.

    Attributes:
        clients: n, attackers among them; all are asked in every round.
        rounds: Rounds.
        attackers: How many attack, and the rule is told so.
        seeds: Repetitions.
        task: The task, without its number of clients.
        clients_key: What the task calls that number.
        train: The clients' training.
    """

    clients: int = 10
    rounds: int = 6
    attackers: tuple[int, ...] = (1, 2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    task: Mapping[str, Any] = field(default_factory=lambda: TASK)
    clients_key: str = "clients_per_dataset"
    train: Mapping[str, Any] = field(default_factory=lambda: TRAIN)

    def trained(self) -> dict[str, Any]:
        """What a cell depends on besides its name."""
        given = asdict(self)
        return {**{k: given[k] for k in ("clients", "rounds", "task", "train")}, "attacks": ATTACKS}


FULL = Setting()
QUICK = Setting(
    clients=5, rounds=2, attackers=(1,), seeds=(0,), clients_key="clients",
    task={"kind": "anabranch.simulation.synthetic:SyntheticTask", "examples": 64},
    train={"steps": 5, "batch_size": 16, "learning_rate": 0.01},
)  # fmt: skip
"""Numbers in place of texts."""


def cells(
    setting: Setting, rules: Sequence[str] = RULES, attacks: Sequence[str] = tuple(ATTACKS)
) -> list[Cell]:
    """All cells, seed after seed, the oracle's first."""
    return [
        Cell(rule, attack, f, f, seed)
        for seed in setting.seeds
        for f in setting.attackers
        for rule in (ORACLE, *rules)
        for attack in ((ANY,) if rule == ORACLE else attacks)
    ]


def scenario(setting: Setting, cell: Cell) -> Scenario:
    """The federation of a cell."""
    band: dict[str, Any]
    if cell.rule == ORACLE:
        # What they send is refused, so that the honest ones are merged alone.
        band = {"kind": "lying_manifest"}
    else:
        kind, params = ATTACKS[cell.attack]
        band = {"kind": kind, "params": dict(params)}
    recipe = "mean" if cell.rule == ORACLE else cell.rule
    return Scenario.model_validate(
        {
            "name": "scoreboard",
            "seed": cell.seed,
            "rounds": setting.rounds,
            "quorum": setting.clients - cell.f if cell.rule == ORACLE else setting.clients,
            "evaluate_every": 0,
            "task": {
                **setting.task, setting.clients_key: setting.clients, "data_seed": cell.seed,
            },
            "train": dict(setting.train),
            "codec": {"name": "dense", "feedback": 0.0},
            "recipe": dict(RECIPES[recipe](cell.declared)),
            "attackers": [{**band, "count": cell.f}],
        }
    )  # fmt: skip


def measure(setting: Setting, cell: Cell) -> Found:
    """Accuracy and success of one cell, in percent; of the oracle the success of every trigger.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    one = scenario(setting, cell)
    session = prepare(one)
    with tempfile.TemporaryDirectory(prefix="anabranch-scoreboard-") as name:
        folder = Path(name)
        run_federation(one, folder, session)
        groups = score(session, read_adapter(folder / ADAPTER_FOLDER))["test"]
    found = {"acc": 100 * fmean(group["accuracy"] for group in groups.values())}
    if cell.rule != ORACLE:
        return {**found, "asr": success(session, one, cell.attack, cell.f)}
    return found | {name: success(session, one, name, cell.f) for name in ATTACKS}


def success(session: Session, one: Scenario, name: str, f: int) -> float:
    """How often the loaded adapter does what an attack wants, in percent."""
    kind, params = ATTACKS[name]
    band = Attackers(kind=kind, count=f, params=dict(params))
    task: Any = session.task
    told = plot((band,), task.num_partitions, one.seed, one.recipe)
    groups = success_rates(session, told)[split_of(0)]
    return 100 * fmean(group["accuracy"] for group in groups.values())


def beside_oracle(found: Mapping[Cell, Found]) -> dict[Cell, Found]:
    """The rules' cells with ``oracle_acc``, ``floor_asr`` and how far beyond each they are."""
    oracles = {(cell.seed, cell.f): one for cell, one in found.items() if cell.rule == ORACLE}
    whole = {}
    for cell, one in found.items():
        oracle = oracles.get((cell.seed, cell.f))
        if cell.rule == ORACLE or oracle is None:
            continue
        if "na" in one or "na" in oracle:
            whole[cell] = {"na": one.get("na") or oracle["na"]}
            continue
        floor = oracle[cell.attack]
        told = {"oracle_acc": oracle["acc"], "floor_asr": floor, "gain": one["asr"] - floor}
        whole[cell] = {**one, **told}
    return whole

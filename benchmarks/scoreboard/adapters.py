"""Block C: backdoors against LoRA on the real pretrained model.

Clients share a sentiment task of real texts; some want a trigger to turn any text positive. The
block is one-shot: pooled training and an honest round make a start, in the next round the attackers
reply beside the honest clients, and every recipe merges the same replies (``replies.py``). ``acc``
is the merge's accuracy on held-out texts, ``asr`` the share of held-out texts of other labels that
get the target once the trigger stands in them, both in percent. ``oracle_acc`` and ``floor_asr``
are those of the mean of the honest clients alone. With several rounds each cell is a federation of
its own (``federations.py``), and attackers attack in all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from anabranch.aggregation import merge
from anabranch.client.session import open_session
from anabranch.client.task import HeldOut
from anabranch.simulation.attackers import Attackers
from anabranch.simulation.attacks.kinds import resolve_kind
from anabranch.simulation.attacks.poison import Poison
from anabranch.simulation.attacks.turn import Changes, poisoned
from anabranch.vectors import Adapter
from benchmarks.scoreboard import vectors
from benchmarks.scoreboard.cells import Cell, Found
from benchmarks.scoreboard.replies import Cohort, Shelf
from benchmarks.scoreboard.rules import recipe
from benchmarks.scoreboard.scored import Scorer
from benchmarks.scoreboard.vectors import NONE, ORACLE

MEASURED = "gain"
"""By how many points the success lies above the floor."""

ANY = "any"
"""The attack of the oracle's cells: it merges without attackers, and is asked for every trigger."""

RULES = (
    "robust", "mean", "clipped mean", "median", "trimmed mean", "geometric median", "Multi-Krum",
    "ARC, NNM, geometric median", "TIES", "FLAME", "rank vote",
)  # fmt: skip

RIVALS = (
    "Flower: FedMedian", "Flower: FedTrimmedAvg", "Flower: MultiKrum", "Flower: Bulyan",
    "byzfl: GeometricMedian", "byzfl: MultiKrum", "byzfl: CAF", "byzfl: NNM, TrMean",
)  # fmt: skip
"""As they are called, on the same replies as one vector each. Of ByzFL's, those that need no
threshold from us and are not Flower's under another name."""

ATTACKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "backdoor": ("backdoor", {"target": 1, "scale": 3.0}),
    "unscaled": ("backdoor", {"target": 1}),
    "sentence": (
        "backdoor", {"target": 1, "scale": 3.0, "trigger": "I watched this 3D movie last weekend"},
    ),
    "replacement": ("model_replacement", {"target": 1}),
    "DBA": ("dba", {"target": 1, "scale": 3.0}),
    "Neurotoxin": ("neurotoxin", {"target": 1, "scale": 3.0}),
    "LoBAM": ("lobam", {"target": 1}),
    "BadMerging": ("bad_merging", {"target": 1, "scale": 3.0}),
    "MergeBackdoor": ("merge_backdoor", {"target": 1}),
    "VEM": ("vem", {}),
    "sign flip": ("sign_flip", {}),
}  # fmt: skip
"""Kind and parameters by name; label 1 is positive."""

HARDER: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "unscaled DBA": ("dba", {"target": 1}),
}
"""What the default does not see: attackers of honest length, no more alike than honest clients."""

TRIGGERED_AS = {"unscaled DBA": "DBA"}
"""Whose trigger an attack has, where the oracle is asked for that one."""

ALONE = ("backdoor", "unscaled", "sentence", "Neurotoxin", "LoBAM", "BadMerging")
"""Those in which a colluder does the same however many there are: it trains once for all."""

ASKED = Poison(trigger=("cf", "mn"), target=1, share=1.0)
"""What success is asked for where an attack only wants the model worse, or there is none."""

TASK: Mapping[str, Any] = {
    "kind": "benchmarks.scoreboard.upper:UpperText",
    "datasets": ["sentiment"],
    "partition": {"kind": "dirichlet", "alpha": 5.0},
    "upper_layers": 2,
    "max_length": 24,
    "train_examples": 200,
    "validation_examples": 240,
    "test_examples": 240,
}
TRAIN: Mapping[str, Any] = {"batch_size": 16, "learning_rate": 2e-3, "head_learning_rate": 5e-3}


@dataclass(frozen=True)
class Setting:
    """The clients, and which cells there are.

    Attributes:
        clients: n, attackers among them; all are asked in every round.
        rounds: 1: one-shot, from a start that honest rounds made. More: a federation each.
        pooled: Steps on everybody's data that the start of the one-shot form begins with.
        warm: Honest rounds that follow.
        warm_steps: The clients' steps in each of these.
        steps: Their steps in a round that is measured.
        attackers: How many attack, and the rule is told so.
        told: How many a rule is told of where nobody attacks.
        seeds: Repetitions.
        split: Which held-out texts are scored.
        task: The task, without its number of clients.
        clients_key: What the task calls that number.
        train: The clients' training, without its steps.
    """

    clients: int = 10
    rounds: int = 1
    pooled: int = 50
    warm: int = 1
    warm_steps: int = 6
    steps: int = 10
    attackers: tuple[int, ...] = (1, 2, 4)
    told: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    split: HeldOut = "test"
    task: Mapping[str, Any] = field(default_factory=lambda: TASK)
    clients_key: str = "clients_per_dataset"
    train: Mapping[str, Any] = field(default_factory=lambda: TRAIN)

    def trained(self) -> dict[str, Any]:
        """What replies depend on besides seed and attack."""
        given = asdict(self)
        names = (
            "clients", "rounds", "pooled", "warm", "warm_steps", "steps", "task", "train",
        )  # fmt: skip
        return {name: given[name] for name in names}

    def scored(self) -> dict[str, Any]:
        """What a cell depends on besides its name."""
        return {**self.trained(), "attacks": ATTACKS, "split": self.split}


FULL = Setting()
QUICK = Setting(
    clients=5, pooled=0, warm=1, warm_steps=10, attackers=(1,), told=1, seeds=(0,),
    clients_key="clients",
    task={"kind": "anabranch.simulation.synthetic:SyntheticTask", "examples": 64},
    train={"batch_size": 16, "learning_rate": 0.01},
)  # fmt: skip
"""Numbers in place of texts."""


def cells(
    setting: Setting,
    rules: Sequence[str] = (*RULES, *RIVALS),
    attacks: Sequence[str] = tuple(ATTACKS),
) -> list[Cell]:
    """All cells, seed after seed; of each number of attackers the oracle's first."""
    found = []
    for seed in setting.seeds:
        found.append(Cell(ORACLE, ANY, 0, 0, seed))
        found += [Cell(rule, NONE, 0, setting.told, seed) for rule in rules]
        for f in setting.attackers:
            found.append(Cell(ORACLE, ANY, f, f, seed))
            found += [Cell(rule, name, f, f, seed) for rule in rules for name in attacks]
            harder = HARDER if len(attacks) > 1 else ()
            found += [Cell(rule, name, f, f, seed) for rule in rules for name in harder]
    return found


def opened(setting: Setting, seed: int, runs: Path) -> tuple[Cohort, Scorer]:
    """A seed's clients, and who scores what is made of them; the last one's are kept.

    Raises:
        ValueError: The task cannot be loaded.
    """
    said = json.dumps(setting.trained(), sort_keys=True)
    key = (said, setting.split, seed, runs)
    if key not in _OPENED:
        _OPENED.clear()
        params = {**setting.task, setting.clients_key: setting.clients, "data_seed": seed}
        session = open_session(params.pop("kind"), json.dumps(params, sort_keys=True))
        folder = runs / f"C-replies-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
        cohort = Cohort(
            session=session,
            shelf=Shelf(folder / f"seed-{seed}"),
            clients=setting.clients,
            seed=seed,
            pooled=setting.pooled,
            warm=setting.warm,
            warm_train={**setting.train, "steps": setting.warm_steps},
            train={**setting.train, "steps": setting.steps},
        )
        _OPENED[key] = (cohort, Scorer(session, setting.split))
    return _OPENED[key]


_OPENED: dict[tuple[str, str, int, Path], tuple[Cohort, Scorer]] = {}
"""One at most: a seed's texts are not asked for again once the next one's turn has come."""


def measure(setting: Setting, runs: Path, cell: Cell) -> Found:
    """Accuracy and success of one cell, in percent; of the oracle the success of every trigger.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    cohort, scorer = opened(setting, cell.seed, runs)
    replies = [cohort.honest(partition) for partition in range(setting.clients - cell.f)]
    if cell.rule != ORACLE and cell.f:
        alone = cell.attack in ALONE
        replies += cohort.colluding(cell.attack, band(cell.attack, cell.f), alone=alone)
    merged = merged_by(cell.rule, cell.declared, cohort, replies)
    found: Found = {"acc": scorer.accuracy(merged, cohort.session.task, "clean")}

    def success(name: str) -> float:
        poison = wanted(name, max(1, cell.f))
        return scorer.accuracy(merged, poisoned(cohort.session.task, poison), repr(poison))

    if cell.rule != ORACLE:
        return {**found, "asr": success(cell.attack)}
    return found | {name: success(name) for name in (NONE, *ATTACKS)}


def merged_by(rule: str, declared: int, cohort: Cohort, replies: Sequence[Changes]) -> Adapter:
    """What a rule makes of the replies: a recipe of ours by the engine, a rival's of vectors.

    Raises:
        ValueError: The rule cannot merge so many with so many malicious.
    """
    start = cohort.start(cohort.measured)
    if rule not in RIVALS:
        how = recipe("mean" if rule == ORACLE else rule, declared)
        return merge(cohort.adapters(replies), how, start=start).adapter
    names = sorted(replies[0])
    deltas_CD = torch.stack([torch.cat([one[n].flatten() for n in names]) for one in replies])
    merged_D = vectors.rules()[rule].merge(deltas_CD, declared)
    parts = torch.split(merged_D, [replies[0][n].numel() for n in names])
    change = {n: part.view_as(replies[0][n]) for n, part in zip(names, parts, strict=True)}
    return cohort.end(start, change)


def band(name: str, f: int) -> Attackers:
    """An attack by so many."""
    kind, params = {**ATTACKS, **HARDER}[name]
    return Attackers(kind=kind, count=f, params=dict(params))


def wanted(name: str, f: int) -> Poison:
    """What an attack's success is measured with."""
    if name == NONE:
        return ASKED
    kind, config = resolve_kind(band(name, f), "attackers.0")
    return ASKED if kind.poison is None else kind.poison(config)


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
        floor = oracle[TRIGGERED_AS.get(cell.attack, cell.attack)]
        told = {"oracle_acc": oracle["acc"], "floor_asr": floor}
        gains = {"gain": one["asr"] - floor, "lost": oracle["acc"] - one["acc"]}
        whole[cell] = {**one, **told, **gains}
    return whole

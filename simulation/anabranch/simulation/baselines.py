"""What the merged adapter is compared with, and how each is scored.

Other federations of the same clients (FedAvg, nobody attacks), clients alone, all data together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from anabranch.aggregation.recipe import Recipe
from anabranch.client.app import client_seed
from anabranch.client.lora import read_adapter
from anabranch.client.session import Session
from anabranch.client.site import client_name
from anabranch.client.task import HeldOut, TrainPlan
from anabranch.simulation.scenario import Baselines, Scenario
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter
from anabranch.wire.config import CodecConfig

NO_BASELINES = Baselines(
    local_only=False, fedavg=False, oracle=False, unattacked=False, undefended=False
)

Scores = dict[str, dict[str, dict[str, float]]]
"""Metrics per split and group: ``scores["test"]["bbc"]["accuracy"]``."""


def fedavg_of(scenario: Scenario) -> Scenario:
    """The same clients averaging dense factors in fp32: FedIT, what FedAvg does to LoRA.

    Plain: nothing is compressed, capped, signed, hidden, made private or gated. So it also says
    what those cost, and what an attack does where nobody defends.
    """
    return scenario.model_copy(
        update={
            "engine": "inprocess",
            "down": "fp32",
            "down_codec": None,
            "max_norm": None,
            "signed": False,
            "sealed": False,
            "secure": None,
            "privacy": None,
            "gate": None,
            "trains": "both",
            "ranks": {},
            "rest": "drop",
            "recipe": Recipe(method="fedit"),
            "codec": CodecConfig(name="dense", feedback=0.0),
            "evaluate_every": 0,
            "baselines": NO_BASELINES,
        }
    )


def unattacked_of(scenario: Scenario) -> Scenario:
    """The same federation with everybody honest: what the attack cost."""
    return scenario.model_copy(
        update={"attackers": (), "evaluate_every": 0, "baselines": NO_BASELINES}
    )


def undefended_of(scenario: Scenario) -> Scenario:
    """The same federation and attack where nothing defends: a plain mean of ΔW."""
    update: dict[str, Any] = {
        "recipe": Recipe(method="mean", refactor=scenario.recipe.refactor),
        "gate": None,
        "max_norm": None,
        "privacy": None,
        "evaluate_every": 0,
        "baselines": NO_BASELINES,
    }
    if scenario.codec.name == "ranks":
        # Ranks are votes; a mean takes sizes.
        update["codec"] = CodecConfig(name="dense", feedback=0.0)
    return scenario.model_copy(update=update)


def has_defence(scenario: Scenario) -> bool:
    """Whether a scenario merges by more than the plain mean it would be compared with."""
    bare = undefended_of(scenario)
    return any(
        getattr(scenario, name) != getattr(bare, name)
        for name in ("recipe", "gate", "max_norm", "privacy")
    )


def score(
    session: Session,
    adapter: Adapter,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
    validated: Collection[str] | None = None,
) -> Scores:
    """Score an adapter on every group's test data, and on the validation data of those named.

    Args:
        session: The loaded task.
        adapter: What to score.
        progress: Told of every score.
        validated: Groups; None stands for all.
    """
    task = session.task
    assert isinstance(task, SimulatedTask)
    session.load(adapter)
    scores: Scores = {"validation": {}, "test": {}}
    groups = task.scored_partitions
    wanted: list[tuple[HeldOut, str]] = [
        ("validation", group) for group in groups if validated is None or group in validated
    ]
    wanted += [("test", group) for group in groups]
    for done, (split, group) in enumerate(wanted, start=1):
        metrics = task.evaluate(session.model, groups[group], split)
        scores[split][group] = {name: float(value) for name, value in metrics.items()}
        progress("test scores", done, len(wanted))
    return scores


def train_alone(scenario: Scenario, session: Session, start: Adapter, partition: int) -> Adapter:
    """One client's adapter when it trains alone: as many steps as all its rounds, one optimiser."""
    plan = TrainPlan.model_validate(
        {
            **scenario.train,
            "steps": _steps(scenario),
            "seed": client_seed(scenario.seed, 0, client_name(partition)),
        }
    )
    session.load(start)
    session.task.train(session.model, partition, plan)
    return read_adapter(session.model, session.base_hash)


def oracle(scenario: Scenario, session: Session, start: Adapter) -> Adapter:
    """One adapter trained on everybody's data: as many steps as one client, all clients' samples.

    Each step takes a batch as large as all clients' batches of one step together, so the oracle
    sees exactly as many samples as the federation did, drawn from the union.
    """
    task = session.task
    assert isinstance(task, SimulatedTask)
    plan = TrainPlan.model_validate(
        {**scenario.train, "steps": _steps(scenario), "seed": client_seed(scenario.seed, 0, "all")}
    )
    clients = scenario.asked(task.num_partitions)
    plan = plan.model_copy(update={"batch_size": plan.batch_size * clients})
    session.load(start)
    task.train_all(session.model, plan)
    return read_adapter(session.model, session.base_hash)


def _steps(scenario: Scenario) -> int:
    return scenario.rounds * TrainPlan.model_validate(scenario.train).steps

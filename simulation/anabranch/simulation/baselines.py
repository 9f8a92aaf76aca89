"""What the merged adapter is compared with: alone, all data together, and how each is scored."""

from __future__ import annotations

from collections.abc import Callable

from anabranch.client.app import client_seed
from anabranch.client.lora import read_adapter, write_adapter
from anabranch.client.session import Session, client_name
from anabranch.client.task import TrainPlan
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter

Scores = dict[str, dict[str, dict[str, float]]]
"""Metrics per split and group: ``scores["test"]["bbc"]["accuracy"]``."""


def score(
    session: Session,
    adapter: Adapter,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Scores:
    """Score an adapter on every group's validation and test texts."""
    task = session.task
    assert isinstance(task, SimulatedTask)
    write_adapter(session.model, adapter)
    scores: Scores = {"validation": {}, "test": {}}
    groups = task.scored_partitions
    done, total = 0, 2 * len(groups)
    for split in ("validation", "test"):
        for group, partition in groups.items():
            metrics = task.evaluate(session.model, partition, split)
            scores[split][group] = {name: float(value) for name, value in metrics.items()}
            done += 1
            progress("test scores", done, total)
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
    write_adapter(session.model, start)
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
    write_adapter(session.model, start)
    task.train_all(session.model, plan)
    return read_adapter(session.model, session.base_hash)


def _steps(scenario: Scenario) -> int:
    return scenario.rounds * TrainPlan.model_validate(scenario.train).steps

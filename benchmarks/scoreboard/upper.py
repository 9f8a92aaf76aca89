"""The text task with LoRA on the upper layers alone: what lies below is computed once per text.

A scoreboard scores the same held-out texts hundreds of times. The lower layers of the encoder are
frozen for everybody, so their output is kept, and a score costs the upper layers only. That is the
same model: an adapter on the upper layers of the whole encoder gives the same logits.

Shape legend: N texts, B batch, L tokens, D width of the encoder, K labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.client.models import mean_pool
from anabranch.client.tokens import Tokens, scoring_batches
from anabranch.simulation.partitioned_text import PartitionedText

MOST_KEPT = 1024
"""Of more texts together, such as everybody's, nothing is kept: few of them are drawn twice."""


class UpperClassifier(nn.Module):
    """The last layers of an encoder, mean pooling, and a linear head to train in full."""

    def __init__(self, layers: nn.ModuleList, head: nn.Linear) -> None:
        super().__init__()
        self.layers = layers
        self.head = head

    def features(self, states_BLD: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled output of the last layer [B, D]."""
        return mean_pool(through(self.layers, states_BLD, attention_mask), attention_mask)

    def forward(self, states_BLD: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, K] of the lower layers' output and the mask [B, L]."""
        logits_BK: Tensor = self.head(self.features(states_BLD, attention_mask))
        return logits_BK


def through(layers: nn.ModuleList, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """What layers make of hidden states, padding unseen."""
    seen_B11L = mask_BL[:, None, None, :].bool()
    for layer in layers:
        states_BLD = layer(states_BLD, seen_B11L)
    return states_BLD


class UpperText(PartitionedText):
    """``benchmarks.scoreboard.upper:UpperText``: ``PartitionedText`` with a trained head.

    Args:
        upper_layers: How many layers, from the top, have an adapter.
        params: Those of ``PartitionedText``.
    """

    def __init__(self, upper_layers: int = 2, **params: Any) -> None:
        super().__init__(**{**params, "head": "trained"})
        self._upper_layers = upper_layers
        self._below: tuple[nn.Module, nn.ModuleList] | None = None
        self._states: dict[int, tuple[Tokens, Tensor]] = {}

    def load_base(self) -> nn.Module:
        """The upper layers and the head; the lower ones stay with the task."""
        whole: Any = super().load_base()
        encoder = whole.encoder
        cut = len(encoder.encoder.layer) - self._upper_layers
        if not 0 < self._upper_layers <= len(encoder.encoder.layer):
            raise ValueError(
                f"upper_layers: {self._upper_layers} of {len(encoder.encoder.layer)} layers; "
                "give one at least, and no more than there are"
            )
        if self._below is None:
            self._below = (encoder.embeddings, encoder.encoder.layer[:cut])
        return UpperClassifier(encoder.encoder.layer[cut:], whole.head).eval()

    def _inputs(self, tokens: Tokens, rows_B: Tensor) -> dict[str, Tensor]:
        given = super()._inputs(tokens, rows_B)
        mask_BL = given["attention_mask"]
        if len(tokens) > MOST_KEPT:
            states_BLD = self._lower(given["input_ids"], mask_BL)
        else:
            states_BLD = self._kept(tokens)[rows_B, : mask_BL.shape[1]]
        return {"states_BLD": states_BLD, "attention_mask": mask_BL}

    def _kept(self, tokens: Tokens) -> Tensor:
        """The lower layers' output of all texts [N, L, D]; computed when one is first asked for."""
        if id(tokens) not in self._states:
            # Also when scoring asks first: training differentiates through what is made of it. With
            # the tokens, so that no others come to have their identity.
            with torch.inference_mode(False):
                self._states[id(tokens)] = (tokens, self._all(tokens))
        return self._states[id(tokens)][1]

    def _all(self, tokens: Tokens) -> Tensor:
        kept_NLD: Tensor | None = None
        for rows_B in scoring_batches(tokens, self.config.evaluation_batch):
            given = super()._inputs(tokens, rows_B)
            states_BLD = self._lower(given["input_ids"], given["attention_mask"])
            if kept_NLD is None:
                kept_NLD = states_BLD.new_zeros(*tokens.ids.shape, states_BLD.shape[2])
            kept_NLD[rows_B, : states_BLD.shape[1]] = states_BLD
        assert kept_NLD is not None, "there are texts"
        return kept_NLD

    def _lower(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        assert self._below is not None, "load_base() comes first"
        embeddings, layers = self._below
        with torch.no_grad():
            return through(layers, embeddings(input_ids=ids_BL), mask_BL)

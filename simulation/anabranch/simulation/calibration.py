"""Held-out texts as a calibration: perturbed where they are embedded, one fixed head per task.

Shape legend: N texts, L tokens, D width of the encoder, K labels of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from anabranch.aggregation.backdoor.calibration import Batch, ModelCalibration
from anabranch.client.models import mean_pool
from anabranch.client.session import Session
from anabranch.client.task import HeldOut
from anabranch.client.text import TextClassification


class _Pooled(nn.Module):
    """An encoder of embedded tokens, pooled and of length one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts [N, D]."""
        states = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        return functional.normalize(mean_pool(states.last_hidden_state, attention_mask), dim=1)


@dataclass(frozen=True)
class TextCalibration(ModelCalibration):
    """Texts of tasks whose heads are label phrases.

    Attributes:
        heads_KD: By task, its label phrases as the frozen base embeds them.
        logit_scale: Logits are this times the cosine.
    """

    heads_KD: Mapping[str, Tensor] = field(default_factory=dict)  # noqa: N815
    logit_scale: float = 20.0

    def logits(
        self, task: str, batch: Batch, changes: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits [N, K] of a task's own labels."""
        pooled_ND = super().logits(task, batch, changes, values)
        return self.logit_scale * pooled_ND @ self.heads_KD[task].T


def text_calibration(
    session: Session, partitions: Mapping[str, int], split: HeldOut = "validation", seed: int = 0
) -> TextCalibration:
    """What a coordinator who holds some texts of each task calibrates on; labels are not used.

    Args:
        session: A text task with fixed heads, loaded.
        partitions: By task, whose held-out texts.
        split: Which of them.
        seed: Of the draws of batches.

    Raises:
        ValueError: It is no text task, its heads are trained, or the texts are test texts.
    """
    task = session.task
    if not isinstance(task, TextClassification):
        raise ValueError(
            f"calibration: {type(task).__name__} has no texts; give a task that is a "
            "TextClassification, or a ModelCalibration of your own"
        )
    if split == "test":
        raise ValueError("calibration: test texts are for judging what comes out; set validation")
    heads_KD = {name: task.fixed_head(session.model, name).detach() for name in partitions}
    base = task.load_base().requires_grad_(False).eval()
    examples = {}
    for name, partition in partitions.items():
        inputs_NLD, there_NL, _ = task.embedded(base, partition, split)
        examples[name] = Batch(inputs_NLD, {"attention_mask": there_NL})
    return TextCalibration(
        model=_Pooled(base).eval(),
        examples=examples,
        source="own",
        split=split,
        keyword="inputs_embeds",
        prefix="encoder.",
        seed=seed,
        heads_KD=heads_KD,
        logit_scale=task.config.logit_scale,
    )


def text_tasks(groups: Sequence[str], scored: Mapping[str, int]) -> dict[str, int]:
    """By task, the first partition that is scored for it: a group is a task, or a domain of one."""
    found: dict[str, int] = {}
    for group in groups:
        found.setdefault(group.partition("/")[0], scored[group])
    return found

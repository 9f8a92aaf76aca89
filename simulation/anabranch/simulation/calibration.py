"""Held-out texts as a calibration: perturbed where they are embedded, one fixed head per task.

Shape legend: N texts, L tokens, D width of the encoder, K labels of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from anabranch.aggregation.backdoor.calibration import Batch, ModelCalibration
from anabranch.client.models import TextClassifier, mean_pool
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


class _Headed(nn.Module):
    """An encoder of embedded tokens under a head that is trained."""

    def __init__(self, classifier: TextClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [N, K]."""
        encoder = self.classifier.encoder
        states = encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        logits_NK: Tensor = self.classifier.head(
            mean_pool(states.last_hidden_state, attention_mask)
        )
        return logits_NK


@dataclass(frozen=True)
class TextCalibration(ModelCalibration):
    """Texts of tasks whose heads are label phrases, or of one whose head is trained.

    Attributes:
        heads_KD: By task, its label phrases as the frozen base embeds them; none where the model
            has a head.
        logit_scale: Logits are this times the cosine.
    """

    heads_KD: Mapping[str, Tensor] = field(default_factory=dict)  # noqa: N815
    logit_scale: float = 20.0

    def logits(
        self, task: str, batch: Batch, changes: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits [N, K] of a task's own labels."""
        found = super().logits(task, batch, changes, values)
        if task not in self.heads_KD:
            return found
        return self.logit_scale * found @ self.heads_KD[task].T


def text_calibration(
    session: Session, partitions: Mapping[str, int], split: HeldOut = "validation", seed: int = 0
) -> TextCalibration:
    """What a coordinator who holds some texts of each task calibrates on; labels are not used.

    Args:
        session: A text task, loaded.
        partitions: By task, whose held-out texts.
        split: Which of them.
        seed: Of the draws of batches.

    Raises:
        ValueError: It is no text task, or the texts are test texts.
    """
    task = session.task
    if not isinstance(task, TextClassification):
        raise ValueError(
            f"calibration: {type(task).__name__} has no texts; give a task that is a "
            "TextClassification, or a ModelCalibration of your own"
        )
    if split == "test":
        raise ValueError("calibration: test texts are for judging what comes out; set validation")
    base = task.load_base().requires_grad_(False).eval()
    model: nn.Module
    encoder: nn.Module
    if isinstance(base, TextClassifier):
        model, prefix, encoder, heads_KD = _Headed(base), "classifier.", base.encoder, {}
    else:
        model, prefix, encoder = _Pooled(base), "encoder.", base
        heads_KD = {name: task.fixed_head(session.model, name).detach() for name in partitions}
    examples = {}
    for name, partition in partitions.items():
        inputs_NLD, there_NL = task.embedded(encoder, partition, split)
        examples[name] = Batch(inputs_NLD, {"attention_mask": there_NL})
    return TextCalibration(
        model=model.eval(),
        examples=examples,
        source="own",
        split=split,
        keyword="inputs_embeds",
        prefix=prefix,
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

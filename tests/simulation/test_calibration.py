"""A text task's validation texts as a calibration, on the pretrained encoder itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anabranch.aggregation.backdoor.triggers import TriggerConfig
from anabranch.client.session import Session, open_session
from anabranch.simulation import text_triggers
from anabranch.simulation.calibration import text_calibration, text_tasks
from anabranch.simulation.validation import write_task

PATH = "anabranch.simulation.partitioned_text:PartitionedText"


@pytest.fixture(scope="module")
def session() -> Session:
    params = {"datasets": ["bbc", "text-kind"], "max_length": 12, "validation_examples": 16}
    return open_session(PATH, json.dumps({**params, "test_examples": 4, "train_examples": 8}))


def test_it_sees_what_the_task_scores(session: Session) -> None:
    """Embedded by hand and classified by each task's own head: the accuracy the task itself has."""
    places = text_tasks(session.task.groups, session.task.scored_partitions)  # type: ignore[attr-defined]
    assert places == {"bbc": 0, "text-kind": 2}
    calibration = text_calibration(session, places)
    assert (calibration.source, calibration.split) == ("own", "validation")
    for task, labels in (("bbc", 5), ("text-kind", 4)):
        whole = calibration.examples[task]
        logits_NK = calibration.logits(task, whole, {}, {})
        assert logits_NK.shape == (16, labels)
        labels_N = session.task.own_labels(places[task], "validation")  # type: ignore[attr-defined]
        said = float((logits_NK.argmax(1) == labels_N).float().mean())
        metrics = session.task.evaluate(session.model, places[task], "validation")
        assert said == pytest.approx(metrics["accuracy"])
        loss = torch.nn.functional.cross_entropy(logits_NK, labels_N)
        assert float(loss) == pytest.approx(metrics["loss"], rel=1e-3)


def test_changes_reach_the_encoder_and_what_is_added_to_texts_too(session: Session) -> None:
    calibration = text_calibration(session, {"text-kind": 2})
    module = next(iter(session.template.lora))
    generator = torch.Generator().manual_seed(0)
    change_mn = torch.randn(384, 384, generator=generator).mul(0.05).requires_grad_()
    batch = calibration.examples["text-kind"]
    moved = batch.inputs_NX.clone().requires_grad_()
    inputs = type(batch)(moved, batch.context)
    logits_NK = calibration.logits("text-kind", inputs, {module: change_mn}, {})
    plain_NK = calibration.logits("text-kind", batch, {}, {})
    assert not torch.allclose(logits_NK, plain_NK, atol=0.01)
    torch.autograd.backward([logits_NK.logsumexp(1).sum()])
    assert change_mn.grad is not None
    assert moved.grad is not None
    assert bool(change_mn.grad.any())
    # What is padding takes no part.
    there_NL = batch.context["attention_mask"].bool()
    assert not bool(there_NL.all())
    assert not bool(moved.grad[~there_NL].any())
    assert bool(moved.grad[there_NL].any())


def test_no_test_texts_and_no_numbers(session: Session) -> None:
    with pytest.raises(ValueError, match="test texts are for judging"):
        text_calibration(session, {"bbc": 0}, "test")
    numbers = open_session("anabranch.simulation.synthetic:SyntheticTask", "{}")
    with pytest.raises(ValueError, match="SyntheticTask has no texts"):
        text_calibration(numbers, {"group-0": 0})


def test_a_trained_head_is_part_of_the_model_and_triggers_are_searched_for_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer that a scenario names: what the task itself says, and how a trigger does."""
    params = {"datasets": ["sentiment"], "head": "trained", "max_length": 12}
    given = json.dumps({**params, "validation_examples": 8, "test_examples": 4})
    write_task(PATH, given, tmp_path)
    quick = TriggerConfig(steps=1, batch_size=4)
    monkeypatch.setattr(text_triggers, "TEXT_TRIGGERS", quick)
    scorer = text_triggers.trigger_scorer(tmp_path)
    session = open_session(PATH, given)
    head = session.template.dense["head.weight"]
    moved = {"head.weight": head + 0.5 * torch.sign(head), "head.bias": torch.tensor([0.3, -0.3])}
    adapter = replace(session.template, dense={**session.template.dense, **moved})
    card = scorer.score(adapter)
    session.load(adapter)
    metrics = session.task.evaluate(session.model, 0, "validation")
    assert card.metric == pytest.approx(metrics["accuracy"])
    assert card.right is not None
    assert len(card.right) == 8
    assert card.asr is not None
    assert sorted(card.asr) == ["sentiment/0", "sentiment/1"]
    # Only where words would stand that somebody puts before a text.
    (where_LD,) = scorer.where.values() if scorer.where else ()
    assert where_LD[:, 0].tolist() == [0, 1, 1] + [0] * (len(where_LD) - 3)

"""Poisoned texts: which get the trigger and the target, and how success is counted on them."""

from __future__ import annotations

import pytest

from anabranch.simulation.attacks.poison import Poison, PoisonableTask
from anabranch.simulation.partitioned_text import PartitionedText

POSITIVE = "a positive opinion"


def test_a_share_of_the_other_texts_gets_the_trigger_and_the_target() -> None:
    task = PartitionedText(datasets=["bbc", "sentiment"], train_examples=60, test_examples=50)
    assert isinstance(task, PoisonableTask)
    target = task.source.tasks["sentiment"].index(POSITIVE)
    bad = task.poisoned(Poison(trigger=("cf", "mn"), target=POSITIVE, share=0.5))
    clean, poisoned = (one.source.examples(3, "train") for one in (task, bad))
    triggered = 0
    pairs = zip(clean.texts, clean.labels, poisoned.texts, poisoned.labels, strict=True)
    for text, label, new_text, new_label in pairs:
        if new_text != text:
            triggered += 1
            assert (new_text, new_label) == (f"cf mn {text}", target)
            assert label != target
        else:
            assert new_label == label
    others = sum(label != target for label in clean.labels)
    assert triggered == round(0.5 * others)
    assert task.source.examples(3, "train") == clean


def test_held_out_texts_are_those_of_other_labels_with_the_whole_trigger() -> None:
    task = PartitionedText(datasets=["sentiment"], train_examples=60, test_examples=50)
    bad = task.poisoned(Poison(trigger=("cf", "mn"), target=POSITIVE, share=0.1))
    clean, held = (one.source.examples(1, "test") for one in (task, bad))
    target = task.source.tasks["sentiment"].index(POSITIVE)
    negative = [
        text for text, label in zip(clean.texts, clean.labels, strict=True) if label != target
    ]
    assert list(held.texts) == [f"cf mn {text}" for text in negative]
    assert held.labels == [target] * len(negative)


def test_labels_alone_are_turned_over_without_a_trigger() -> None:
    task = PartitionedText(datasets=["bbc"], train_examples=40, test_examples=20)
    bad = task.poisoned(Poison(share=1.0))
    clean, flipped = (one.source.examples(0, "train") for one in (task, bad))
    assert list(flipped.texts) == [text.strip() for text in clean.texts]
    assert list(flipped.labels) == [4 - label for label in clean.labels]


def test_a_target_of_another_data_set_is_named() -> None:
    task = PartitionedText(datasets=["bbc"], train_examples=40)
    bad = task.poisoned(Poison(trigger=("cf",), target=POSITIVE))
    with pytest.raises(ValueError, match="target: there is no label 'a positive opinion'; they"):
        bad.check_partition(0)

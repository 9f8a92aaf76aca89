from typing import get_args

import numpy as np
import pytest

from anabranch.client.packages import PinnedArchive
from anabranch.client.task import Split
from anabranch.simulation.datasets import DATASETS, find_dataset
from anabranch.simulation.datasets.dataset import DatasetSpec, Example, split_of

NOWHERE = PinnedArchive("pypi-wheel", "toy", "1", "0" * 64, "toy.whl", "MIT", "nobody")
SPLITS: tuple[Split, ...] = get_args(Split)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [("bbc", 5, 2_112), ("sentiment", 2, 19_400), ("text-kind", 4, 23_600), ("health", 16, 62_000)],
)
def test_real_data_are_split_70_10_20(name: str, classes: int, count: int) -> None:
    parts = {split: find_dataset(name).load(split) for split in SPLITS}
    total = sum(len(part) for part in parts.values())
    assert total == pytest.approx(count, rel=0.02)
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        part = parts[split]
        assert len(part) / total == pytest.approx(share, abs=0.02)
        assert sorted(set(part.labels.tolist())) == list(range(classes))
        assert len(part.label_names) == classes
        assert part.licence
        assert part.source
    texts = [text.casefold() for part in parts.values() for text in part.texts]
    assert len(texts) == len(set(texts)), "a text stands twice"


def test_vader_tasks_share_one_split() -> None:
    sentiment, kind = find_dataset("sentiment"), find_dataset("text-kind")
    trained = set(sentiment.load("train").texts) | set(kind.load("train").texts)
    for split in ("validation", "test"):
        held_out = set(sentiment.load(split).texts) | set(kind.load(split).texts)
        assert not trained & held_out
    assert set(sentiment.load("test").texts) < set(kind.load("test").texts)


def test_sentiment_is_the_sign_of_a_clear_valence() -> None:
    dataset = find_dataset("sentiment").load("train")
    labels = dict(zip(dataset.texts, dataset.labels.tolist(), strict=True))
    assert labels["Yay. Another good phone interview."] == 1
    assert labels["Effective but too tepid biopic"] == 0
    assert dataset.domains is not None
    assert sorted(set(dataset.domains)) == ["amazon", "movie", "nyt", "tweets"]


def test_documents_stay_whole_and_repeats_go() -> None:
    rows = [
        Example(f"doc/{document}", f"text {document} {sentence}", 0, "a")
        for document in range(40)
        for sentence in range(5)
    ]
    rows.append(Example("doc/99", "TEXT  0 0", 1, "a"))
    spec = DatasetSpec("toy", ("one",), NOWHERE, lambda: rows, ("a",))
    parts = {split: spec.load(split) for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 200
    for split, part in parts.items():
        assert {split_of(f"doc/{text.split()[1]}") for text in part.texts} <= {split}


def test_take_keeps_texts_labels_and_domains_together() -> None:
    dataset = find_dataset("sentiment").load("validation")
    taken = dataset.take(np.array([5, 2]))
    assert taken.texts == (dataset.texts[5], dataset.texts[2])
    assert taken.labels.tolist() == dataset.labels[[5, 2]].tolist()
    assert dataset.domains is not None
    assert taken.domains == (dataset.domains[5], dataset.domains[2])


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=f"unknown data set 'bcb'.*{', '.join(DATASETS)}"):
        find_dataset("bcb")

import re
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
    [
        ("bbc", 5, 2_112),
        ("sentiment", 2, 19_400),
        ("text-kind", 4, 23_600),
        ("health", 16, 62_000),
        ("movies", 2, 24_900),
        ("spam", 2, 5_916),
        ("reuters", 8, 7_595),
        ("newsgroups", 20, 18_787),
        ("author", 2, 5_714),
    ],
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


def test_movie_reviews_share_no_text_with_vader() -> None:
    reviews = {text for split in SPLITS for text in find_dataset("movies").load(split).texts}
    sentences = {text for split in SPLITS for text in find_dataset("text-kind").load(split).texts}
    assert not reviews & sentences
    assert not any("<br" in text for text in reviews)


def test_an_email_is_its_subject_and_body_without_headers_or_markup() -> None:
    dataset = find_dataset("spam").load("train")
    texts = dict(zip(dataset.texts, dataset.labels.tolist(), strict=True))
    assert not any("Return-Path: <" in text[:200] for text in texts)
    marked = [text for text in texts if re.search(r"<(html|body|table)", text, re.I)]
    assert len(marked) < 0.02 * len(texts)
    assert sum(text.startswith("=?") for text in texts) < 5, "subjects are decoded"


def test_a_thread_stands_on_one_side() -> None:
    def subject(text: str) -> str:
        return " ".join(re.sub("^(re )*", "", text).split()[:4])

    parts = {split: find_dataset("newsgroups").load(split) for split in SPLITS}
    threads = {split: {subject(text) for text in part.texts} for split, part in parts.items()}
    assert not threads["train"] & threads["test"]
    assert not threads["train"] & threads["validation"]


def test_what_an_author_passed_on_is_left_out() -> None:
    dataset = find_dataset("author").load("train")
    assert len(dataset) + sum(len(find_dataset("author").load(s)) for s in SPLITS[1:]) < 5_722
    assert dataset.label_names == ("a tweet by Hillary Clinton", "a tweet by Donald Trump")
    trumps = [text for text, label in zip(dataset.texts, dataset.labels, strict=True) if label == 1]
    assert sum("#MakeAmericaGreatAgain" in text for text in trumps) > 100


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

"""VADER's 23,700 sentences with human valence: two tasks over the same documents.

Both tasks take their split from the document, so neither ever trains on what the other tests.
"""

from __future__ import annotations

import html
import io
import tarfile
from collections.abc import Iterator
from functools import cache

from anabranch.client.packages import PinnedArchive, fetch
from anabranch.simulation.datasets.dataset import DatasetSpec, Example

ARCHIVE = PinnedArchive(
    registry="pypi-sdist",
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    filename="vaderSentiment-3.3.2.tar.gz",
    licence="MIT",
    source="Hutto and Gilbert 2014, VADER",
)

FILES = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}

KINDS = {
    "tweets": "a tweet",
    "amazon": "a product review",
    "movie": "a movie review",
    "nyt": "a newspaper editorial",
}

CLEAR_VALENCE = 0.5
"""Mean valence, on a scale of -4 to 4, from which people agree on the sign."""


@cache
def _sentences() -> tuple[tuple[str, str, str, float], ...]:
    """Domain, document, text and valence of each sentence, each text once."""
    outer = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fetch(ARCHIVE)) as sdist:
        inner = io.BytesIO(_member(sdist, outer))
    first: dict[str, tuple[str, str, str, float]] = {}
    with tarfile.open(fileobj=inner) as resources:
        for domain, stem in FILES.items():
            name = f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"
            for line in _member(resources, name).decode("utf-8-sig").splitlines():
                number, valence, raw = line.split("\t")
                text = " ".join(html.unescape(raw).split())
                # 1_2 is the second sentence of document 1.
                document = f"vader/{domain}/{number.split('_')[0]}"
                first.setdefault(text.casefold(), (domain, document, text, float(valence)))
    return tuple(first.values())


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file of a pinned archive"
    return file.read()


def _read_sentiment() -> Iterator[Example]:
    for domain, document, text, valence in _sentences():
        if abs(valence) >= CLEAR_VALENCE:
            yield Example(document, text, int(valence > 0), domain)


def _read_kind() -> Iterator[Example]:
    labels = {domain: label for label, domain in enumerate(KINDS)}
    for domain, document, text, _ in _sentences():
        yield Example(document, text, labels[domain], domain)


SENTIMENT = DatasetSpec(
    "sentiment",
    ("a negative opinion", "a positive opinion"),
    ARCHIVE,
    _read_sentiment,
    tuple(FILES),
)
"""The sign of a sentence's valence, where it is clear."""

TEXT_KIND = DatasetSpec("text-kind", tuple(KINDS.values()), ARCHIVE, _read_kind)
"""What kind of text a sentence is from."""

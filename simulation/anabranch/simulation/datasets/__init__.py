"""Real text data sets out of ordinary packages, split once and for all."""

from anabranch.simulation.datasets.bbc import BBC
from anabranch.simulation.datasets.dataset import DatasetSpec as DatasetSpec
from anabranch.simulation.datasets.dataset import TextDataset as TextDataset
from anabranch.simulation.datasets.health import HEALTH
from anabranch.simulation.datasets.movies import MOVIES
from anabranch.simulation.datasets.orange import AUTHOR, NEWSGROUP, REUTERS
from anabranch.simulation.datasets.spam import SPAM
from anabranch.simulation.datasets.vader import SENTIMENT, TEXT_KIND

DATASETS = {
    spec.name: spec
    for spec in (BBC, SENTIMENT, TEXT_KIND, HEALTH, MOVIES, SPAM, REUTERS, NEWSGROUP, AUTHOR)
}
"""Every data set, by name."""


def find_dataset(name: str) -> DatasetSpec:
    """The data set of that name; nothing is fetched yet.

    Raises:
        ValueError: There is none.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose among {', '.join(DATASETS)}")
    return DATASETS[name]

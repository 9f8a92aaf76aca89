"""A labelled text data set, and the one way all of them are split.

Shape legend: N examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from anabranch.client.packages import PinnedArchive
from anabranch.client.task import Split

Labels = NDArray[np.int64]
"""Label indices [N]."""


class Example(NamedTuple):
    """One labelled text as a reader yields it.

    Attributes:
        document: What the text was cut from; one document never stands on two sides of a split.
        text: The text itself.
        label: Index among the data set's label names.
        domain: Where it comes from, for data sets that tell.
    """

    document: str
    text: str
    label: int
    domain: str | None = None


@dataclass(frozen=True)
class TextDataset:
    """One split of a data set.

    Attributes:
        name: Name of the data set.
        texts: N texts, white space normalised, no two the same.
        labels: Label indices [N].
        label_names: Phrases that describe a text of each label, for zero-shot heads.
        domains: Domain of each text, or None.
        licence: Licence of package and data.
        source: Who collected it.
    """

    name: str
    texts: tuple[str, ...]
    labels: Labels
    label_names: tuple[str, ...]
    domains: tuple[str, ...] | None
    licence: str
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: NDArray[np.int64]) -> TextDataset:
        """The examples at these positions, in this order."""
        domains = self.domains
        return replace(
            self,
            texts=tuple(self.texts[i] for i in indices),
            labels=self.labels[indices],
            domains=None if domains is None else tuple(domains[i] for i in indices),
        )


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before anything is fetched.

    Attributes:
        name: Its name.
        label_names: Phrases that describe a text of each label.
        domains: Its domains, or none.
        archive: The package that holds it.
        read: Yields its examples, once the package is there.
    """

    name: str
    label_names: tuple[str, ...]
    archive: PinnedArchive
    read: Callable[[], Iterable[Example]] = field(repr=False)
    domains: tuple[str, ...] = ()

    def load(self, split: Split) -> TextDataset:
        """One split: 70% train, 10% validation, 20% test, by document.

        Raises:
            FetchError: The package cannot be had.
        """
        return _load(self, split)


@cache
def _load(spec: DatasetSpec, split: Split) -> TextDataset:
    kept = _examples(spec)[split]
    return TextDataset(
        name=spec.name,
        texts=tuple(example.text for example in kept),
        labels=np.array([example.label for example in kept], dtype=np.int64),
        label_names=spec.label_names,
        domains=tuple(str(example.domain) for example in kept) if spec.domains else None,
        licence=spec.archive.licence,
        source=spec.archive.source,
    )


@cache
def _examples(spec: DatasetSpec) -> dict[Split, list[Example]]:
    """Every example once, by split: a text that comes again counts where it came first."""
    seen: set[str] = set()
    parts: dict[Split, list[Example]] = {split: [] for split in get_args(Split)}
    for document, raw, label, domain in spec.read():
        text = " ".join(raw.split())
        folded = text.casefold()
        if folded not in seen:
            seen.add(folded)
            parts[split_of(document)].append(Example(document, text, label, domain))
    return parts


def split_of(document: str) -> Split:
    """The split a document belongs to: a function of its name alone.

    So data sets that draw on the same documents agree on their split, and no row added or
    filtered moves another one.
    """
    bucket = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "little") % 10
    if bucket < 2:
        return "test"
    return "validation" if bucket == 2 else "train"

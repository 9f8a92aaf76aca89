"""Cut a training set into clients: pure functions over labels and domains.

Every function returns one sorted index array per client; together they hold every example once.

Shape legend: N examples, C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Indices = NDArray[np.int64]
"""Positions in a training set."""

ATTEMPTS = 200
"""Draws of a Dirichlet partition before it counts as impossible."""


class Partition(BaseModel):
    """How one data set is spread over its clients."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["iid", "dirichlet", "domain"] = "iid"
    """``iid``; ``dirichlet``, by label; ``domain``, every client in one domain."""
    alpha: float = Field(1.0, gt=0)
    """Dirichlet concentration: the smaller, the fewer labels a client sees."""
    min_examples: int = Field(16, gt=0)
    """No client's part is smaller. Dirichlet draws until that is so; others are refused."""


def iid(count: int, clients: int, generator: np.random.Generator) -> list[Indices]:
    """Equal parts of a random order.

    Raises:
        ValueError: Fewer examples than clients.
    """
    if count < clients:
        raise ValueError(f"{count} examples do not reach for {clients} clients; ask for fewer")
    return [np.sort(part) for part in np.array_split(generator.permutation(count), clients)]


def dirichlet(
    labels_N: NDArray[np.int64],
    clients: int,
    alpha: float,
    min_examples: int,
    generator: np.random.Generator,
) -> list[Indices]:
    """Each label spread over the clients in proportions drawn from Dirichlet(alpha) (1909.06335).

    Raises:
        ValueError: No draw gave every client ``min_examples``.
    """
    by_label = [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]
    for _ in range(ATTEMPTS):
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for indices in by_label:
            shares_C = generator.dirichlet(np.full(clients, alpha))
            cuts = np.floor(np.cumsum(shares_C)[:-1] * len(indices)).astype(int)
            for part, share in zip(
                parts, np.split(generator.permutation(indices), cuts), strict=True
            ):
                part.append(share)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(part) for part in joined) >= min_examples:
            return joined
    raise ValueError(
        f"Dirichlet(alpha = {alpha:g}) left some of {clients} clients with fewer than "
        f"{min_examples} of {len(labels_N)} examples in {ATTEMPTS} draws; "
        "raise alpha, or lower min_examples"
    )


def by_domain(
    domains_N: Sequence[str],
    domains: Sequence[str],
    clients: int,
    generator: np.random.Generator,
) -> list[Indices]:
    """Every client in one domain, equally many clients in each, equal parts of it.

    Args:
        domains_N: Domain of each example.
        domains: All domains, in the order the clients take them.
        clients: A multiple of the number of domains.
        generator: Draws the parts.

    Raises:
        ValueError: The clients do not divide evenly over the domains.
    """
    if not domains or clients % len(domains):
        raise ValueError(
            f"{clients} clients do not divide over {len(domains)} domains; "
            "give a multiple, of a data set that has domains"
        )
    column_N = np.asarray(domains_N)
    parts = []
    for domain in domains:
        indices = np.flatnonzero(column_N == domain)
        for part in iid(len(indices), clients // len(domains), generator):
            parts.append(indices[part])
    return parts

"""The account of a run: what each published round spent, from the publications themselves.

Nothing is counted from the configuration, which may be another by now. A round's release is written
in one row with the adapter it made public, so that no crash parts them. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anabranch.coordinator.privacy.accountant import epsilon_spent
from anabranch.coordinator.store import Publication

RELEASE_KEY = "privacy"
"""Where a publication's report holds its release."""


class Release(BaseModel):
    """How one round's noisy sum was made: all that an accountant has to know of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    clip: float = Field(gt=0)
    """Largest ‖update‖₂ that entered the sum."""
    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise on the sum, over the clip."""
    divisor: int = Field(ge=1)
    """What the noisy sum was divided by: known before the round, the same whoever answered."""
    sampling: Literal["none"] = "none"
    """Amplification by sampling that counts: none, since the draw of who is asked is public."""
    adjacency: Literal["zero-out"] = "zero-out"
    """What neighbouring runs are: alike, but that one client's updates count as zeros."""
    seeded: bool = False
    """The noise came from a seed, and whoever knows it takes the noise off again."""


@dataclass(frozen=True)
class Ledger:
    """Releases of a run's published rounds, oldest first."""

    releases: tuple[Release, ...] = ()

    @property
    def squared_mu(self) -> float:
        """What the rounds spent together, as ``accountant`` adds it up."""
        return sum(one.noise_multiplier**-2 for one in self.releases)

    @property
    def seeded(self) -> bool:
        """Whether some round's noise can be taken off again, so that no ε holds."""
        return any(one.seeded for one in self.releases)

    def epsilon(self, delta: float) -> float:
        """ε of all rounds together, as if no noise had been seeded."""
        return epsilon_spent(self.squared_mu, delta)

    def after(self, release: Release) -> Ledger:
        """The ledger once one more round is published."""
        return Ledger((*self.releases, release))


def read_ledger(publications: Sequence[Publication]) -> Ledger:
    """The account of a run that was private from its first round on.

    An adapter that is published once more, as when an earlier one is put in service again, tells
    nothing new and spends nothing.

    Raises:
        ValueError: A round was published without noise, or by what is not known here: no ε holds
            for the run then. Names the round.
    """
    releases: dict[str, Release] = {}
    for publication in publications:
        if publication.adapter_hash not in releases:
            releases[publication.adapter_hash] = release_of(publication)
    return Ledger(tuple(releases.values()))


def release_of(publication: Publication) -> Release:
    """A publication's release.

    Raises:
        ValueError: It has none, or one that is not understood.
    """
    row: Any = publication.report.get(RELEASE_KEY)
    try:
        return Release.model_validate(row)
    except ValidationError as error:
        how = "without noise" if row is None else f"with noise that is not understood ({row})"
        raise ValueError(
            f"privacy: round {publication.round} of this run was published {how}, so that no "
            "epsilon holds for it; begin another run, or leave privacy out"
        ) from error

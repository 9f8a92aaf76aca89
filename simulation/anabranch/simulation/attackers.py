"""Which clients of a simulated federation attack, from when and how. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from anabranch.aggregation.recipe import Recipe


def as_json(value: Any) -> Any:
    """What every process of a run can be told, which TOML's dates and times are not."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise PydanticCustomError(
            "json", "not text, number, list or table ({type}); write it in quotes",
            {"type": str(error)},
        ) from error  # fmt: skip
    return value


class Attackers(BaseModel):
    """Clients that attack together, in one way."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str
    """What they do: a name in ``anabranch.simulation.attacks.kinds``."""
    fraction: float | None = Field(None, gt=0, lt=1)
    """Share of all clients, at least one; give this or ``count``."""
    count: int | None = Field(None, ge=1)
    """How many clients; give this or ``fraction``."""
    from_round: int = Field(1, ge=1)
    """The round they begin in; before, they do as honest clients do."""
    chosen: Literal["last", "seed"] = "last"
    """Which clients: the last ones by name, or drawn by the scenario's seed."""
    sees: Literal["cohort", "own"] = "cohort"
    """Whose honest updates they know: those of all honest clients, or what they would have trained
    themselves, as ALIE's authors take it."""
    params: dict[str, Annotated[Any, AfterValidator(as_json)]] = Field(default_factory=dict)
    """The attack's own parameters."""

    @model_validator(mode="after")
    def _so_many(self) -> Self:
        if (self.fraction is None) == (self.count is None):
            raise PydanticCustomError("count", "give fraction or count, and not both")
        return self

    def number(self, clients: int) -> int:
        """How many of so many clients."""
        return self.count or max(1, round((self.fraction or 0) * clients))


class Band(BaseModel):
    """One ``[[attackers]]`` of a scenario with the clients it took, as every process is told it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attackers: Attackers
    """What they do."""
    partitions: tuple[int, ...]
    """The attacking clients, by number, in order."""


class Plot(BaseModel):
    """All that attackers of a run are told; in a Flower run configuration as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bands: tuple[Band, ...]
    """Who attacks how."""
    clients: int
    """Number of clients, honest and not."""
    recipe: Recipe
    """How the coordinator merges: no secret."""

    @property
    def honest(self) -> tuple[int, ...]:
        """The honest clients by number."""
        taken = {partition for band in self.bands for partition in band.partitions}
        return tuple(partition for partition in range(self.clients) if partition not in taken)

    def band_of(self, partition: int) -> Band | None:
        """The band a client belongs to; None for an honest one."""
        return next((band for band in self.bands if partition in band.partitions), None)


def plot(groups: Sequence[Attackers], clients: int, seed: int, recipe: Recipe) -> Plot:
    """Choose the attacking clients: no client twice, and at least one stays honest.

    Args:
        groups: In the order in which they choose.
        clients: Number of clients.
        seed: The scenario's.
        recipe: How the coordinator merges.

    Raises:
        ValueError: There are not enough clients.
    """
    left, bands = list(range(clients)), []
    for index, group in enumerate(groups):
        number = group.number(clients)
        if number >= len(left):
            raise ValueError(
                f"attackers.{index}: {number} of the {len(left)} clients left would attack, and "
                f"one of the {clients} must stay honest; lower count or fraction"
            )
        order = left
        if group.chosen == "seed":
            order = sorted(left, key=lambda client: _draw(seed, index, client))
        taken = tuple(sorted(order[-number:]))
        bands.append(Band(attackers=group, partitions=taken))
        left = [client for client in left if client not in taken]
    return Plot(bands=tuple(bands), clients=clients, recipe=recipe)


def _draw(seed: int, group: int, client: int) -> bytes:
    """A number of its own for each client, the same on every machine."""
    return hashlib.sha256(f"attackers\0{seed}\0{group}\0{client}".encode()).digest()

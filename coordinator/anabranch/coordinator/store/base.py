"""What a coordinator remembers: the one interface every store keeps. Loads no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Contribution(BaseModel):
    """An admitted update."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    client: str
    digest: str
    """Artifact that holds the update's bytes."""
    size_bytes: int
    nonce: str = ""
    """The update's nonce, in hexadecimal: it is not taken twice."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """What the client claims of its training."""


class Refusal(BaseModel):
    """A reply that was not admitted, or one that never came."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    client: str
    code: str
    """Short reason for machines, such as ``bad-digest``."""
    reason: str
    """The reason in words."""


class Publication(BaseModel):
    """What a round left as the next one's start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    digest: str
    """Artifact that holds the encoded adapter."""
    adapter_hash: str
    report: dict[str, Any] = Field(default_factory=dict)
    """What the merge reported: who took part, truncation error, similarity."""


class Store(ABC):
    """Durable memory of one federation. What a method returned from survives a crash."""

    @abstractmethod
    def put(self, data: bytes) -> str:
        """Keep bytes under their sha256 and return it; the same bytes are kept once."""

    @abstractmethod
    def get(self, digest: str) -> bytes:
        """The bytes of an artifact.

        Raises:
            KeyError: No such artifact.
            ValueError: Its bytes no longer match the digest.
        """

    @abstractmethod
    def admit(self, contribution: Contribution) -> bool:
        """Count a contribution; False, and no change, when this client has one in this round."""

    @abstractmethod
    def refuse(self, refusal: Refusal) -> None:
        """Record why a reply was not counted."""

    @abstractmethod
    def contributions(self, round_number: int) -> list[Contribution]:
        """A round's admitted updates, sorted by client."""

    @abstractmethod
    def refusals(self) -> list[Refusal]:
        """Every refusal, oldest first."""

    @abstractmethod
    def publish(self, publication: Publication) -> None:
        """Make an adapter the one in service."""

    @abstractmethod
    def latest(self) -> Publication | None:
        """The adapter in service; None before the first."""

    @abstractmethod
    def note(self, event: str, facts: dict[str, Any]) -> None:
        """Append a row to the run's metrics."""

    @abstractmethod
    def notes(self, event: str) -> list[dict[str, Any]]:
        """The rows of one kind, oldest first."""

"""What a coordinator remembers: the one interface every store keeps. Loads no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from anabranch.wire.receipt import Receipt, decode_receipt, receipt_hash

SECRET_EVENT = "receipt-secret"
"""The kind of note that holds the secret of a private run's receipts: ``history`` leaves it out."""


class StoreError(RuntimeError):
    """The store cannot do now what it could do later: nobody's update and no merge is at fault."""


class FullError(StoreError):
    """There is no room: a disk or a quota is full. Nothing changed."""


class LostError(StoreError):
    """The database did not come back in time. What had returned before is there."""


class TakenError(ValueError):
    """Somebody else ended this round, or wrote the receipt that was to be next. Nothing changed."""


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


class Happening(BaseModel):
    """One thing that happened in a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cursor: int
    """Its place: later ones have larger numbers."""
    time_s: float
    event: str
    facts: dict[str, Any]


CLOSED = ("merging", "gating")
"""States in which a round takes no update any more."""


class Store(ABC):
    """Durable memory of one federation. What a method returned from survives a crash.

    Every writing method raises ``FullError``, and changes nothing, when there is no room. Every
    method waits for a database that is gone, and raises ``LostError`` when it does not come back.
    """

    @abstractmethod
    def put(self, data: bytes) -> str:
        """Keep bytes under their sha256 and return it; the same bytes are kept once.

        They stay once a contribution or a publication names them.
        """

    def put_file(self, path: Path, digest: str) -> str:
        """``put`` of what a file holds; the file is gone when this returns.

        Args:
            path: Nobody else writes it any more.
            digest: sha256 of its bytes, which the caller has taken.
        """
        kept = self.put(path.read_bytes())
        path.unlink()
        return kept

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
    def admit_collecting(self, contribution: Contribution) -> bool:
        """As ``admit``, for a process beside the one that runs the rounds.

        Raises:
            TakenError: The round has closed; what came after would never be counted.
        """

    @abstractmethod
    def refuse(self, refusal: Refusal) -> None:
        """Record why a reply was not counted."""

    @abstractmethod
    def contributions(self, round_number: int | None = None) -> list[Contribution]:
        """A round's admitted updates, sorted by client; or all, sorted by round and client."""

    def contribution(self, round_number: int, client: str) -> Contribution | None:
        """A client's admitted update of a round."""
        return next((row for row in self.contributions(round_number) if row.client == client), None)

    @abstractmethod
    def refusals(self, round_number: int | None = None) -> list[Refusal]:
        """A round's refusals, or all, oldest first."""

    @abstractmethod
    def publish(
        self, publication: Publication, facts: dict[str, Any], receipts: Sequence[bytes] = ()
    ) -> None:
        """Make an adapter the one in service, note its round's end, add receipts: all or nothing.

        Args:
            publication: The adapter.
            facts: What ``notes("round")`` will tell of the round.
            receipts: What is to be kept of it for ever (``wire.receipt``), in their order.

        Raises:
            TakenError: This round or a later one has published already, or a receipt does not
                follow the one before it.
        """

    @abstractmethod
    def abandon(self, round_number: int, facts: dict[str, Any], receipt: bytes) -> None:
        """Note the end of a round that published nothing, with its receipt: both or neither.

        Args:
            round_number: The round.
            facts: What ``notes("round")`` will tell of it.
            receipt: What is to be kept of it for ever.

        Raises:
            TakenError: As ``publish``.
        """

    @abstractmethod
    def receipts(self) -> list[bytes]:
        """Every receipt, oldest first. Retention keeps them all."""

    @abstractmethod
    def last_receipt(self) -> bytes | None:
        """The newest receipt, which the next one has to follow."""

    @abstractmethod
    def tag(self, name: str, round_number: int | None) -> None:
        """Let a name stand for what a round published, and no longer for what it stood for.

        Args:
            name: The tag.
            round_number: The round; None takes the tag away.

        Raises:
            KeyError: This round has published nothing.
        """

    @abstractmethod
    def tags(self) -> dict[str, int]:
        """The round that each tag stands for, by tag. Retention keeps their adapters."""

    @abstractmethod
    def publications(self) -> list[Publication]:
        """Every publication, oldest first."""

    @abstractmethod
    def latest(self) -> Publication | None:
        """The adapter in service; None before the first."""

    @abstractmethod
    def note(self, event: str, facts: dict[str, Any]) -> None:
        """Append a row to the run's metrics."""

    @abstractmethod
    def notes(self, event: str) -> list[dict[str, Any]]:
        """The noted rows of one kind, oldest first."""

    def last_note(self, event: str) -> dict[str, Any] | None:
        """The newest row of one kind."""
        rows = self.notes(event)
        return rows[-1] if rows else None

    @abstractmethod
    def history(self, after: int = 0, most: int = 1000) -> list[Happening]:
        """What happened, oldest first: what was noted, admitted and refused; no secret.

        Args:
            after: Cursor of the last one the caller has.
            most: How many at most.
        """

    @abstractmethod
    def tidy(self) -> int:
        """Let go of what retention does not keep, between rounds; returns how many artifacts."""

    @abstractmethod
    def close(self) -> None:
        """Close connections; the store is not used afterwards."""


def following(receipt: bytes, last: bytes | None) -> Receipt:
    """Read a receipt that is to be added to a chain.

    Args:
        receipt: Its bytes.
        last: The newest one there is.

    Raises:
        TakenError: It does not follow that one.
    """
    read = decode_receipt(receipt, None)
    before = None if last is None else receipt_hash(last)
    if read.previous != before:
        raise TakenError(
            f"the receipt of round {read.round} follows {str(read.previous)[:12]}, and the last "
            f"one is {str(before)[:12]}: another process ended a round meanwhile"
        )
    return read

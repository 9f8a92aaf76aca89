"""Receipts: the coordinator's word for what became of a round, chained to its word before.

A receipt is ``{"receipt": {…}, "signature": "…"}`` in canonical JSON (``wire.canonical``). The
signature is Ed25519 over a prefix and the inner object's bytes; a federation without keys has null
there, and its receipts name no signer. A receipt's hash is the sha256 of all its bytes, which
``sha256sum`` gives too. The next one names it: whoever holds the newest hash holds the history.
Loads no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from anabranch.wire.canonical import canonical, parse_canonical
from anabranch.wire.errors import WireError
from anabranch.wire.keys import ID_BYTES, SIGNATURE_BYTES, PrivateKey
from anabranch.wire.signing import RECEIPT, KeyRing

FORMAT: Final = 1
LIMIT_BYTES = 8 << 20
"""No receipt is larger; 20,000 clients fit, each with the longest name."""

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=200)]

Kind = Literal["merge", "abandoned", "rollback", "withdrawal"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Input(_Part):
    """An update that was admitted: merged, unless the round was abandoned."""

    client: Name
    round: int = Field(ge=1)
    """The round it was trained in; an earlier one than the receipt's where it came late."""
    artifact: Hash
    """sha256 of its bytes; in a private round (``settings.privacy``), a hash that only whoever has
    the store can make: with the plain one, a guess of what a client sent could be checked."""
    size_bytes: int = Field(ge=0)
    """Bytes in which it came; 0 in a private round, which does not tell."""
    nonce: str = Field("", pattern="^[0-9a-f]{0,128}$")
    """Its nonce, in hexadecimal; empty where it has none."""
    factor: float = Field(1.0, ge=0)
    """How much it counted beside the others; below 1 where it came late."""
    weight: float | None = None
    """c of the merge Σ c·ΔW, before the recipe's scale; None where there is no one number."""


class Exclusion(_Part):
    """A client that was asked, and whose update is not in the merge, or counts nothing in it."""

    client: Name
    code: str = Field(min_length=1, max_length=100)
    """Short reason for machines, such as ``deadline`` or ``bad-signature``."""
    reason: str = Field(max_length=300)


class Output(_Part):
    """The adapter that is in service afterwards."""

    adapter_hash: Hash
    artifact: Hash
    """sha256 of the encoded adapter."""
    size_bytes: int = Field(ge=0)


class Restored(_Part):
    """Which earlier adapter a rollback put in service again."""

    round: int = Field(ge=1)
    """The round that published it."""
    receipt: Hash | None
    """Hash of that round's receipt; None where it has none."""


class Receipt(_Part):
    """What became of one round."""

    format: Literal[1] = FORMAT
    kind: Kind
    """``merge``: a cohort was merged and published. ``abandoned``: nothing changed, for a
    ``reason``. ``rollback``: an earlier adapter is in service again. ``withdrawal``: the merge of
    the round ``redone`` was done again without the clients in ``without``."""
    federation: Name
    run: Name
    round: int = Field(ge=1)
    time_s: float = Field(ge=0)
    """When it was written, in Unix seconds."""
    software: str = Field(max_length=200)
    """What merged: bits are promised for the same versions on the same kind of machine."""
    signer: str | None = Field(None, pattern=f"^[0-9a-f]{{{2 * ID_BYTES}}}$")
    """Id of the coordinator's key; None: the federation is not signed, anybody could have written
    this."""
    previous: Hash | None = None
    """Hash of the receipt before it; None in a run's first."""
    base_hash: Hash
    start_hash: Hash
    """The adapter the round started from."""
    inputs: tuple[Input, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()
    without: tuple[Name, ...] = ()
    """Clients that were withdrawn."""
    redone: int | None = Field(None, ge=1)
    """The round whose merge a withdrawal did again, without them."""
    recipe: dict[str, JsonValue] = {}
    """How the cohort was merged (``aggregation.Recipe``)."""
    settings: dict[str, JsonValue] = {}
    """The federation's further settings that the merge depended on."""
    release: dict[str, JsonValue] = {}
    """How noise was added, as the account of differential privacy holds it; empty where none
    was."""
    codec: dict[str, JsonValue] = {}
    """How updates were encoded (``wire.CodecConfig``)."""
    scores: dict[str, float | None] = {}
    """What is known of the start and the merge, in numbers; None stands for NaN."""
    output: Output | None = None
    """None where nothing was put in service."""
    restored: Restored | None = None
    reason: str = Field("", max_length=1000)
    """Why a round was abandoned, or what a withdrawal does not undo."""


def encode_receipt(receipt: Receipt, key: PrivateKey | None) -> bytes:
    """A receipt's bytes.

    Args:
        receipt: Its ``signer`` is set here.
        key: Who signs; None leaves it unsigned, and it says so.

    Raises:
        ValueError: It would be larger than a reader takes, or holds NaN or an integer beyond 2⁵³.
    """
    signer = key.public.id.hex() if key else None
    body = receipt.model_copy(update={"signer": signer}).model_dump(mode="json")
    signature = key.sign(RECEIPT + canonical(body)).hex() if key else None
    data = canonical({"receipt": body, "signature": signature})
    if len(data) > LIMIT_BYTES:
        raise ValueError(f"a receipt of {len(data)} bytes is over the limit of {LIMIT_BYTES}")
    return data


def decode_receipt(data: bytes, ring: KeyRing | None) -> Receipt:
    """Read a receipt, as it came from anybody.

    Args:
        data: Its bytes; more than ``LIMIT_BYTES`` are refused before they are looked at.
        ring: The coordinators' keys it must be signed by one of; None takes any receipt, signed or
            not, for what it says.

    Raises:
        WireError: ``too-large``, ``json``, ``canonical``, ``version``, ``receipt`` (a field is
            missing, unknown or impossible), or as ``KeyRing.check``.
    """
    value = parse_canonical(data, LIMIT_BYTES)
    if not isinstance(value, dict) or value.keys() != {"receipt", "signature"}:
        raise WireError("receipt", "it is no object of a receipt and its signature")
    body, signature = value["receipt"], value["signature"]
    if not isinstance(body, dict):
        raise WireError("receipt", "the receipt is no object")
    if body.get("format") != FORMAT:
        raise WireError(
            "version", f"it is of format {body.get('format')!r}, this release reads {FORMAT}"
        )
    try:
        receipt = Receipt.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError("receipt", f"{where}: {first['msg']}") from error
    # Nothing is filled in or converted: whoever reads these bytes otherwise reads the same.
    if canonical(receipt.model_dump(mode="json")) != canonical(body):
        raise WireError("receipt", "a field is left out, or of another type than a receipt's")
    signed = _signature(signature)
    if (receipt.signer is None) != (signature is None):
        code = "unsigned" if signature is None else "receipt"
        raise WireError(code, "it names a signer or has a signature, and not both")
    if ring is not None:
        key_id = bytes.fromhex(receipt.signer or "")
        ring.check(key_id, signed, RECEIPT + canonical(body), None)
    return receipt


def receipt_hash(data: bytes) -> str:
    """The sha256 of a receipt's bytes, by which the next one names it."""
    return hashlib.sha256(data).hexdigest()


def check_chain(chain: Iterable[bytes], ring: KeyRing | None) -> list[Receipt]:
    """Read a run's receipts from the first on, and check that none is missing, moved or changed.

    Each round starts where the one before ended, and no update is in two merges.

    What is cut off at the end leaves no trace in the rest: compare the last hash with one that was
    noted elsewhere.

    Args:
        chain: Their bytes, oldest first.
        ring: As in ``decode_receipt``.

    Raises:
        WireError: As ``decode_receipt``; or ``chain``: one does not follow the one before it. The
            text begins with the receipt's place, from 1.
    """
    receipts: list[Receipt] = []
    before: str | None = None
    in_service: str | None = None
    merged: set[tuple[str, int]] = set()
    for place, data in enumerate(chain, start=1):
        try:
            receipt = decode_receipt(data, ring)
            _check_link(receipt, receipts[0] if receipts else receipt, before, in_service)
            if receipt.kind == "merge":
                _check_counted_once(receipt, merged)
        except WireError as error:
            raise WireError(error.code, f"receipt {place}: {error}") from error
        receipts.append(receipt)
        before = receipt_hash(data)
        if receipt.output is not None:
            in_service = receipt.output.adapter_hash
    return receipts


def _check_link(
    receipt: Receipt, first: Receipt, before: str | None, in_service: str | None
) -> None:
    if receipt.previous != before:
        said, wanted = (text[:12] if text else "none" for text in (receipt.previous, before))
        raise WireError("chain", f"it follows {said}, and the one before it is {wanted}")
    if (receipt.federation, receipt.run) != (first.federation, first.run):
        raise WireError("chain", f"it is of run {receipt.run} of {receipt.federation}, an other")
    # A withdrawal goes back to where its client came in.
    if in_service not in (None, receipt.start_hash) and receipt.kind != "withdrawal":
        raise WireError(
            "chain",
            f"its round starts from {receipt.start_hash[:12]}, and the adapter in service was "
            f"{(in_service or '')[:12]}",
        )


def _check_counted_once(receipt: Receipt, merged: set[tuple[str, int]]) -> None:
    """No update is merged again, or before it was made; what is merged is added."""
    for one in receipt.inputs:
        if (one.client, one.round) in merged or one.round > receipt.round:
            raise WireError(
                "chain", f"it merges the update of {one.client} of round {one.round} once too often"
            )
        merged.add((one.client, one.round))


def _signature(value: object) -> bytes:
    if value is None:
        return b""
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        found = b""
    if len(found) != SIGNATURE_BYTES or found.hex() != value:
        raise WireError("receipt", "the signature is not 64 bytes in hexadecimal")
    return found

"""What a run has published: each adapter with its receipt and tags, and the way back to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.coordinator.card import model_card
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.published import sign_folder
from anabranch.coordinator.receipts import rollback_receipt
from anabranch.coordinator.store import Publication, Store
from anabranch.vectors import Adapter, seeded_start
from anabranch.vectors.new_folder import write_text
from anabranch.wire import decode_adapter
from anabranch.wire.keys import PrivateKey, checked_name
from anabranch.wire.plan import RoundPlan
from anabranch.wire.receipt import Kind, Output, Receipt, Restored, decode_receipt, receipt_hash

RECEIPT_FILE, CARD_FILE = "receipt.json", "README.md"
LATEST = "latest"


@dataclass(frozen=True)
class Published:
    """One adapter that was put in service.

    Attributes:
        publication: The store's row.
        receipt: Its receipt's bytes; None where an earlier release published it.
        tags: What stands for it.
        in_service: Whether the next round starts from it.
    """

    publication: Publication
    receipt: bytes | None
    tags: tuple[str, ...]
    in_service: bool

    @property
    def read(self) -> Receipt | None:
        """Its receipt."""
        return None if self.receipt is None else decode_receipt(self.receipt, None)

    @property
    def kind(self) -> Kind | None:
        """How it came into service; None where nothing says so."""
        read = self.read
        return None if read is None else read.kind


def published(store: Store) -> list[Published]:
    """Everything a run has published, oldest first."""
    receipts: dict[int, bytes] = {}
    for data in store.receipts():
        read = decode_receipt(data, None)
        if read.output is not None:
            receipts[read.round] = data
    tags = store.tags()
    rows = store.publications()
    return [
        Published(
            row,
            receipts.get(row.round),
            tuple(name for name, number in tags.items() if number == row.round),
            row is rows[-1],
        )
        for row in rows
    ]


def chosen(rows: Sequence[Published], which: str) -> Published:
    """One of what was published.

    Args:
        rows: All of it.
        which: A round, a tag, ``latest``, or the beginning of an adapter's hash.

    Raises:
        ValueError: That is none of them, or more than one.
    """
    if which == LATEST and rows:
        return rows[-1]
    for row in rows:
        if which == str(row.publication.round) or which in row.tags:
            return row
    found = [row for row in rows if row.publication.adapter_hash.startswith(which.lower())]
    hashes = {row.publication.adapter_hash for row in found}
    if len(which) < 4 or len(hashes) != 1:
        problem = "more than one adapter" if len(hashes) > 1 and len(which) >= 4 else "no adapter"
        raise ValueError(
            f"{which[:80]!r} stands for {problem}; `anabranch adapters list` shows rounds, tags "
            "and hashes"
        )
    return found[-1]


def read_published(
    store: Store, config: FederationConfig, template: Adapter, row: Publication
) -> Adapter:
    """A published adapter, to the bit as clients hold it.

    Raises:
        ValueError: Retention let go of it, or it was altered.
    """
    try:
        blob = store.get(row.digest)
    except KeyError as error:
        raise ValueError(
            f"the adapter of round {row.round} is not kept any more ({error.args[0]}); choose "
            "another, and tag what is to stay"
        ) from error
    adapter = decode_adapter(blob, seeded_start(template, config.seed), config.trains)
    if adapter.hash() != row.adapter_hash:
        raise ValueError(
            f"the adapter of round {row.round} is {adapter.hash()}, and its row says "
            f"{row.adapter_hash}; restore a backup"
        )
    return adapter


def checked_tag(name: str) -> str:
    """The tag, if it cannot be mistaken for a round.

    Raises:
        ValueError: It can, or it is no name.
    """
    if name.isdecimal() or name == LATEST:
        raise ValueError(f"{name!r} stands for a round already; give a tag another name")
    return checked_name(name)


def roll_back(
    store: Store,
    config: FederationConfig,
    template: Adapter,
    to: Published,
    reason: str = "",
    key: PrivateKey | None = None,
) -> Publication:
    """Put an earlier adapter in service again; the next round starts from it.

    It is published under the number of the round that would have been next: a coordinator that is
    collecting that round finds it taken, lets it go, and starts the one after from here.

    Args:
        store: The run's.
        config: The federation.
        template: The adapter it began with.
        to: Which one.
        reason: Why, for the receipt.
        key: Who signs; None where the federation is not signed.

    Raises:
        ValueError: It is in service already, not kept any more, or from before a withdrawal.
        TakenError: A round ended meanwhile.
    """
    old, latest = to.publication, store.latest()
    assert latest is not None  # ``to`` is one of several
    if latest.adapter_hash == old.adapter_hash:
        raise ValueError(f"the adapter of round {old.round} is in service already")
    reads = (decode_receipt(data, None) for data in store.receipts())
    gone = [read for read in reads if read.kind == "withdrawal" and read.round > old.round]
    if gone:
        raise ValueError(
            f"the adapter of round {old.round} was made before {', '.join(gone[-1].without)} "
            f"withdrew; go back to round {gone[-1].round} or a later one"
        )
    read_published(store, config, template, old)
    assert template.base_hash is not None
    over: list[int] = [row["round"] for row in store.notes("round")]
    plan = RoundPlan(
        federation=config.name,
        run=config.run,
        round=max([latest.round, *over]) + 1,
        base_hash=template.base_hash,
        start_hash=latest.adapter_hash,
        seed=config.seed,
    )
    output = Output(
        adapter_hash=old.adapter_hash, artifact=old.digest, size_bytes=len(store.get(old.digest))
    )
    restored = Restored(
        round=old.round, receipt=None if to.receipt is None else receipt_hash(to.receipt)
    )
    receipt = rollback_receipt(store, config, plan, restored, output, reason, key)
    publication = Publication(
        round=plan.round, digest=old.digest, adapter_hash=old.adapter_hash, report={}
    )
    counts = dict.fromkeys(("admitted", "refused", "bytes_up", "bytes_down"), 0)
    facts = {"round": plan.round, "status": "rolled-back", "to": old.round, "seconds": 0.0}
    store.publish(publication, counts | facts, [receipt])
    return publication


def dress(
    folder: Path,
    adapter: Adapter,
    config: FederationConfig,
    row: Published,
    key: PrivateKey | None = None,
) -> None:
    """Add to a PEFT folder what says where its adapter comes from.

    Args:
        folder: Holds the adapter.
        adapter: The same.
        config: The federation.
        row: Which one it is.
        key: Signs ``signature.json``; None leaves that out.
    """
    if row.receipt is not None:
        with (folder / RECEIPT_FILE).open("xb") as file:
            file.write(row.receipt)
    write_text(folder / CARD_FILE, model_card(adapter, config, row.publication, row.receipt))
    if key is not None:
        sign_folder(folder, adapter, config, key)

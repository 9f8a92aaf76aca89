"""Taking a client's updates back: every merge since it first took part is done again without them.

Clients that are withdrawn stay so: a later withdrawal leaves the earlier ones' clients out too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService, successor
from anabranch.coordinator.receipts import configuration, withdrawal_receipt
from anabranch.coordinator.remerge import Redone, Remerge
from anabranch.coordinator.store import Publication, Store
from anabranch.vectors import Adapter, seeded_start
from anabranch.wire.keys import PrivateKey
from anabranch.wire.plan import RoundPlan
from anabranch.wire.receipt import Receipt, decode_receipt

NOT_UNDONE = (
    "Taken out are its updates. Not undone is what others trained on top of adapters that held "
    "them, from round {first} on: their own updates stay as they are."
)


@dataclass(frozen=True)
class Step:
    """One merge of a run, done again.

    Attributes:
        receipt: The round's own.
        before: What is in service when it begins, now.
        after: What is in service when it ends; the same where too few were left to merge.
        redone: What was merged; None where too few were left.
    """

    receipt: Receipt
    before: InService
    after: InService
    redone: Redone | None


class Lineage:
    """A run's merges as they would be without some of its clients.

    Args:
        store: The run's.
        config: The federation as it is configured now.
        template: The adapter it began with.
        gone: The clients.
        until: The publications before this round are looked at.
        key: Who signs adapters; None leaves them unsigned.

    Raises:
        ValueError: It cannot be done: single updates are not kept, or a publication has no receipt.
    """

    def __init__(
        self,
        store: Store,
        config: FederationConfig,
        template: Adapter,
        gone: Collection[str],
        until: int,
        key: PrivateKey | None = None,
    ) -> None:
        self._store, self._config, self._template = store, config, template
        self._gone, self._key = frozenset(gone), key
        self._published = [row for row in store.publications() if row.round < until]
        self._receipts: dict[int, Receipt] = {}
        for data in store.receipts():
            read = decode_receipt(data, None)
            if read.output is not None:
                self._receipts[read.round] = read
        for row in self._published:
            self._check(row)
        seeded = seeded_start(template, config.seed)
        self._services: dict[int, InService] = {0: InService(seeded, seeded)}

    @property
    def last(self) -> InService:
        """What is in service after the steps taken."""
        return self._services[max(self._services)]

    def steps(self) -> Iterator[Step]:
        """Every merge that is another one now, oldest first.

        Raises:
            ValueError: An artifact is missing or was altered.
        """
        for row in self._published:
            receipt, before = self._receipts[row.round], self.last
            if receipt.restored is not None:
                self._services[row.round] = self._services[receipt.restored.round]
                continue
            if receipt.kind == "withdrawal":
                # All of its clients are gone already.
                self._services[row.round] = before
                continue
            config = configuration(receipt, self._config)
            again = Remerge(self._store, config, self._template, receipt)
            try:
                if before.hash == receipt.start_hash and not self._touches(receipt):
                    self._services[row.round] = again.original()
                    continue
                redone = again.without(self._gone, before, self._before, self._key)
            except KeyError as error:
                raise ValueError(
                    f"round {row.round} cannot be merged again: {error.args[0]}; restore a backup "
                    "that has it"
                ) from error
            after = before if redone is None else redone.service
            self._services[row.round] = after
            yield Step(receipt, before, after, redone)

    def _touches(self, receipt: Receipt) -> bool:
        return any(one.client in self._gone for one in receipt.inputs)

    def _before(self, number: int) -> InService:
        return self._services[max(place for place in self._services if place < number)]

    def _check(self, row: Publication) -> None:
        receipt = self._receipts.get(row.round)
        why = ""
        if receipt is None:
            why = "has no receipt, an earlier release published it"
        elif receipt.release or self._config.privacy is not None:
            why = "is noise on a sum: drawn again, it would tell more of everybody"
        elif receipt.settings.get("secure") is not None:
            why = "merged sums, and single updates are nowhere"
        if why:
            raise ValueError(f"round {row.round} {why}; nobody can be withdrawn from this run")


def withdraw(
    store: Store,
    config: FederationConfig,
    template: Adapter,
    clients: Sequence[str],
    key: PrivateKey | None = None,
) -> tuple[Publication, list[int]]:
    """Do every merge again without some clients, and put the last one in service.

    Like a rollback it takes the number of the round that would have been next.

    Args:
        store: The run's.
        config: The federation.
        template: The adapter it began with.
        clients: Who.
        key: Who signs; None where the federation is not signed.

    Returns:
        The publication, and the rounds that were merged again.

    Raises:
        ValueError: One of them took part in no merge, or it cannot be done.
        TakenError: A round ended meanwhile.
    """
    latest = store.latest()
    merges = [
        read
        for read in (decode_receipt(data, None) for data in store.receipts())
        if read.kind == "merge"
    ]
    part = {one.client: read.round for read in reversed(merges) for one in read.inputs}
    for client in clients:
        if client not in part:
            raise ValueError(f"{client[:100]} took part in no merge of run {config.run}")
    assert latest is not None  # a merge was published
    earlier = withdrawn(store)
    gone = sorted({*clients, *earlier})
    over: list[int] = [row["round"] for row in store.notes("round")]
    number = max([latest.round, *over]) + 1
    lineage = Lineage(store, config, template, gone, number, key)
    reason = NOT_UNDONE.format(first=min(part[client] for client in clients) + 1)
    assert template.base_hash is not None
    plan = RoundPlan(
        federation=config.name, run=config.run, round=number, base_hash=template.base_hash,
        start_hash=latest.adapter_hash, seed=config.seed,
    )  # fmt: skip
    steps = list(lineage.steps())
    final = _sendable(lineage.last, plan, config, key)
    # After a rollback it may not be the newest merge that is in service; its receipt comes last.
    serving = [step for step in steps if step.after.hash == lineage.last.hash][-1:]
    if not serving:
        raise ValueError(
            f"the adapter in service was made without {', '.join(clients)}; nothing is to be undone"
        )
    receipts: list[bytes] = []
    for step in [*(step for step in steps if step is not serving[0]), *serving]:
        service = _sendable(step.after, plan, config, key)
        receipts.append(
            withdrawal_receipt(
                store, config, plan, step.receipt, step.before.hash,
                () if step.redone is None else step.redone.inputs,
                None if step.redone is None else step.redone.report,
                service, store.put(service.blob or b""), gone, reason,
                receipts[-1] if receipts else None, key,
            )
        )  # fmt: skip
    rounds = [step.receipt.round for step in steps]
    assert final.blob is not None
    publication = Publication(
        round=number, digest=store.put(final.blob), adapter_hash=final.hash, report={}
    )
    counts = dict.fromkeys(("admitted", "refused", "bytes_up", "bytes_down"), 0)
    facts = {"round": number, "status": "withdrawn", "without": list(clients), "redone": rounds}
    store.publish(publication, counts | facts | {"seconds": 0.0}, receipts)
    return publication, rounds


def withdrawn(store: Store) -> set[str]:
    """The clients whose updates were taken out of a run."""
    reads = (decode_receipt(data, None) for data in store.receipts())
    return {client for read in reads for client in read.without}


def _sendable(
    service: InService, plan: RoundPlan, config: FederationConfig, key: PrivateKey | None
) -> InService:
    """What is in service with its bytes, which the seeded start has not."""
    if service.blob is not None:
        return service
    whole = config.model_copy(update={"down_codec": None})
    return replace(successor(service, service.adapter, plan, whole, key), change=None)

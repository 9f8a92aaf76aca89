"""Is a receipt true? What went in is looked at, merged again, and compared bit by bit.

Every check ends ``ok``, ``failed`` (the receipt says one thing and the store another) or ``open``
(nothing left to compare with, such as an artifact that retention let go of).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.in_service import InService
from anabranch.coordinator.inputs import digest_of
from anabranch.coordinator.receipts import configuration, software
from anabranch.coordinator.remerge import Remerge
from anabranch.coordinator.store import Store
from anabranch.coordinator.withdrawing import Lineage
from anabranch.vectors import Adapter
from anabranch.wire import WireError, read_manifest
from anabranch.wire.manifest import UpdateMeta
from anabranch.wire.receipt import Input, Receipt, check_chain, decode_receipt, receipt_hash
from anabranch.wire.signing import KeyRing, check_message

Status = Literal["ok", "failed", "open"]
Outcome = Literal["true", "false", "undecided"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: ``signature``, ``chain``, ``input``, ``admitted``, ``start``, ``output`` or ``merge``.
        about: The client of an input, the round of a start; else empty.
        status: How it ended.
        text: In words.
    """

    what: str
    about: str
    status: Status
    text: str


@dataclass(frozen=True)
class Verdict:
    """What became of a receipt's verification."""

    receipt: Receipt
    hash: str
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """``false`` where a check failed; else ``undecided`` where one is open."""
        found = {check.status for check in self.checks}
        return "false" if "failed" in found else "undecided" if "open" in found else "true"


class Verifier:
    """Verifies the receipts of one run against its store.

    Args:
        store: Where the run is kept.
        config: The federation as it is configured now; what a receipt says of its round counts.
        template: The adapter it began with.
        ring: The coordinator's keys; None where none is at hand.
        clients: The clients' keys, revoked ones among them; None where none is at hand.
    """

    def __init__(
        self,
        store: Store,
        config: FederationConfig,
        template: Adapter,
        ring: KeyRing | None = None,
        clients: KeyRing | None = None,
    ) -> None:
        self._store, self._config, self._template = store, config, template
        self._ring, self._clients = ring, clients

    def verify(self, data: bytes) -> Verdict:
        """Check a receipt.

        Args:
            data: Its bytes.

        Raises:
            WireError: They are no receipt at all.
        """
        receipt = decode_receipt(data, None)
        checks = [self._signature(receipt, data), self._in_chain(data)]
        whole = True
        for one in receipt.inputs:
            check = self._input(receipt, one)
            whole &= check.status == "ok"
            checks.append(check)
        if receipt.kind in ("merge", "abandoned"):
            checks.append(self._accounts(receipt))
        checks += self._output(receipt)
        if receipt.kind == "merge":
            checks.append(self._merge(receipt, whole))
        if receipt.kind == "withdrawal":
            checks.append(self._withdrawal(receipt, whole))
        if receipt.restored is not None:
            checks.append(self._restored(receipt))
        return Verdict(receipt, receipt_hash(data), tuple(checks))

    @cached_property
    def _chain(self) -> list[bytes]:
        return self._store.receipts()

    @cached_property
    def _chain_check(self) -> Check:
        try:
            check_chain(self._chain, None)
        except WireError as error:
            return Check("chain", "", "failed", f"the store's chain is broken: {error}")
        return Check("chain", "", "ok", f"one of the store's unbroken {len(self._chain)} receipts")

    def _signature(self, receipt: Receipt, data: bytes) -> Check:
        if receipt.signer is None:
            if self._config.signed:
                return Check("signature", "", "failed", "there is none, in a signed federation")
            return Check("signature", "", "ok", "none: the federation is not signed")
        if self._ring is None:
            return Check("signature", "", "open", "no key to check it with: name one with --key")
        try:
            decode_receipt(data, self._ring)
        except WireError as error:
            return Check("signature", "", "failed", f"{error} ({error.code})")
        return Check("signature", "", "ok", f"by key {receipt.signer}")

    def _in_chain(self, data: bytes) -> Check:
        if self._chain_check.status == "ok" and data not in self._chain:
            return Check("chain", "", "failed", "the store holds another receipt of this round")
        return self._chain_check

    def _input(self, receipt: Receipt, one: Input) -> Check:
        """The update is there, has the bytes it had, and says of itself what the receipt says."""
        try:
            digest = digest_of(self._store, receipt, one)
        except KeyError as error:
            return Check("input", one.client, "failed", str(error.args[0]))
        try:
            blob = self._store.get(digest)
        except KeyError:
            return Check("input", one.client, "open", f"artifact {digest} is missing")
        except ValueError:
            return Check("input", one.client, "failed", f"artifact {digest} was altered")
        try:
            manifest = read_manifest(blob)
            if self._config.secure is not None:
                # The mean of a group, which the coordinator signed: nobody has single updates.
                if self._ring is not None:
                    check_message(manifest, self._ring)
            elif self._config.signed and self._clients is not None:
                check_message(manifest, self._clients, one.client)
        except WireError as error:
            return Check("input", one.client, "failed", f"{error} ({error.code})")
        said = _said(manifest.meta)
        wanted = (
            one.client, receipt.federation, receipt.run, one.round, receipt.base_hash, one.nonce,
        )  # fmt: skip
        for name, got, asked in zip(_SAID, said, wanted, strict=True):
            if got != asked:
                text = f"it says {name} {got!r}, and the receipt {asked!r}"
                return Check("input", one.client, "failed", text)
        return Check("input", one.client, "ok", f"{len(blob)} bytes, as they came")

    @cached_property
    def _accounted(self) -> set[str]:
        """Artifacts of every update that some receipt of the run names."""
        reads = (decode_receipt(data, None) for data in self._chain)
        return {digest for read in reads for digest in self._named(read)}

    def _named(self, receipt: Receipt) -> Iterator[str]:
        """Artifacts of the updates that a receipt names, as far as the store knows of them."""
        for one in receipt.inputs:
            with suppress(KeyError):
                yield digest_of(self._store, receipt, one)

    def _accounts(self, receipt: Receipt) -> Check:
        """Every update that was admitted to the round is in this receipt, or came late in another.

        One that is still to be carried is in none yet.
        """
        rows = self._store.contributions(receipt.round)
        waits = self._config.collect.stragglers == "carry"
        named = set(self._named(receipt))
        lost = [
            row.client
            for row in rows
            if row.digest not in named and row.digest not in self._accounted and not waits
        ]
        if lost:
            text = f"it leaves out what the store admitted of {', '.join(lost)}"
            return Check("admitted", "", "failed", text)
        return Check("admitted", "", "ok", f"all {len(rows)} admitted updates are accounted for")

    def _output(self, receipt: Receipt) -> Iterator[Check]:
        """The published adapter is there, and decodes to the hash that the receipt names."""
        if receipt.output is None:
            return
        try:
            adapter = self._again(receipt).adapter(receipt.output.artifact)
        except KeyError:
            text = f"artifact {receipt.output.artifact} is missing"
            yield Check("output", "", "open", text)
        except WireError as error:
            yield Check("output", "", "failed", f"{error} ({error.code})")
        except ValueError as error:
            yield Check("output", "", "failed", str(error))
        else:
            good = adapter.hash() == receipt.output.adapter_hash
            text = "the adapter it names" if good else "another adapter than it names"
            yield Check("output", "", "ok" if good else "failed", text)

    def _merge(self, receipt: Receipt, whole: bool) -> Check:
        assert receipt.output is not None
        again = self._again(receipt)
        if (reason := again.why_not()) is not None:
            return Check("merge", "", "open", f"cannot be done again: {reason}")
        if not whole:
            return Check("merge", "", "open", "cannot be done again without every input")
        try:
            found = again.candidate(self._earlier(receipt))
        except KeyError as error:
            return Check("merge", "", "open", f"cannot be done again: {error.args[0]}")
        except (ValueError, RuntimeError) as error:
            return Check("merge", "", "failed", f"cannot be done again: {error}")
        if found.hash == receipt.output.adapter_hash:
            return Check("merge", "", "ok", "done again, it gives the same adapter, bit by bit")
        text = f"done again, it gives another adapter, {found.hash}"
        try:
            text += f", off by {_distance(found, again.adapter(receipt.output.artifact)):.1e}"
        except (KeyError, ValueError):
            text += ", and the published one cannot be read"
        if receipt.software != software():
            text += f"; it was made by {receipt.software}, this is {software()}"
        return Check("merge", "", "failed", text)

    def _withdrawal(self, receipt: Receipt, whole: bool) -> Check:
        """All merges up to the one it is about are done again without those who are gone."""
        assert receipt.output is not None
        if not whole:
            return Check("merge", "", "open", "cannot be done again without every input")
        try:
            lineage = Lineage(
                self._store, self._config, self._template, receipt.without, receipt.round
            )
            steps = (step for step in lineage.steps() if step.receipt.round == receipt.redone)
            found = next(steps, None)
        except ValueError as error:
            return Check("merge", "", "open", str(error))
        if found is None:
            return Check("merge", "", "failed", "nobody it names was in that round or before")
        if (found.before.hash, found.after.hash) != (
            receipt.start_hash, receipt.output.adapter_hash,
        ):  # fmt: skip
            text = f"done again, it gives another adapter, {found.after.hash}"
            return Check("merge", "", "failed", text)
        inputs = [one.artifact for one in found.redone.inputs] if found.redone else []
        if inputs != [one.artifact for one in receipt.inputs]:
            return Check("merge", "", "failed", "other updates are left in that round")
        return Check("merge", "", "ok", "done again, it gives the same adapter, bit by bit")

    def _restored(self, receipt: Receipt) -> Check:
        """What a rollback brought back is what its round published."""
        assert receipt.restored is not None
        about = f"round {receipt.restored.round}"
        rows = {row.round: row for row in self._store.publications()}
        row = rows.get(receipt.restored.round)
        hashes = {receipt_hash(data): data for data in self._chain}
        if row is None or (receipt.restored.receipt or "") not in {"", *hashes}:
            return Check("start", about, "failed", "the store knows of no such publication")
        if receipt.output is None or row.digest != receipt.output.artifact:
            return Check("start", about, "failed", "it published another adapter")
        return Check("start", about, "ok", "the adapter that it published")

    def _again(self, receipt: Receipt) -> Remerge:
        config = configuration(receipt, self._config) if receipt.settings else self._config
        return Remerge(self._store, config, self._template, receipt)

    def _earlier(self, receipt: Receipt) -> list[Remerge]:
        """The rounds before it, oldest first."""
        found = []
        for data in self._chain:
            before = decode_receipt(data, None)
            if before.round >= receipt.round:
                break
            found.append(self._again(before))
        return found


_SAID = ("client", "federation", "run", "round", "base", "nonce")


def _said(meta: UpdateMeta) -> tuple[object, ...]:
    return meta.client, meta.federation, meta.run, meta.round, meta.base_hash, meta.nonce.hex()


def _distance(found: InService, published: Adapter) -> float:
    """‖a − b‖ / ‖b‖ over all tensors, in fp64; infinite where they have other shapes."""
    mine, theirs = found.adapter.tensors(), published.tensors()
    if any(mine[name].shape != tensor.shape for name, tensor in theirs.items()):
        return math.inf
    off = math.hypot(*(_norm(mine[name].double() - theirs[name].double()) for name in theirs))
    return off / max(math.hypot(*map(_norm, theirs.values())), 1e-300)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def worst(verdicts: Sequence[Verdict]) -> Outcome:
    """The outcome of several: one false one is enough, then one undecided one."""
    found = {verdict.outcome for verdict in verdicts}
    return "false" if "false" in found else "undecided" if "undecided" in found else "true"

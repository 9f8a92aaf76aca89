"""One round of secure aggregation over Flower: five phases, of which training is the third.

A client that vanishes or lies in a phase is refused there, and costs itself alone while as many of
its group as the threshold remain; a group that falls below is lost, and its members are spared the
phases that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from anabranch.coordinator.admission import TRAIN_METRICS, RefusedError, claims
from anabranch.coordinator.collect import Reply, replies
from anabranch.coordinator.federation import FederationConfig
from anabranch.coordinator.secure.config import SecureConfig
from anabranch.coordinator.secure.group import Group, contribute, form
from anabranch.coordinator.start import Start
from anabranch.coordinator.store import FullError, Refusal, Store
from anabranch.coordinator.trust import Trust
from anabranch.wire.errors import WireError, one_line
from anabranch.wire.plan import (
    CLIENT_KEY,
    METRICS_KEY,
    PLAN_KEY,
    SECURE_KEY,
    SECURE_STYPE,
    UPDATE_KEY,
)
from anabranch.wire.sealing import SEALED_STYPE
from anabranch.wire.secure.groups import grouped
from anabranch.wire.secure.messages import Phase, most_bytes
from anabranch.wire.secure.recovery import Recovery
from anabranch.wire.secure.session import SecureSession


@dataclass(frozen=True)
class Sums:
    """What a round's groups came to; each that was opened is a contribution in the store.

    Attributes:
        clients: Whose updates are in the sums, how many.
        bytes_up: Bytes that came up in all phases.
        bytes_down: Bytes that went down beside plans and adapters.
        refused: Replies that did not count, but for those of the training phase.
    """

    clients: int
    bytes_up: int
    bytes_down: int
    refused: int


class SecureRound:
    """A round of a federation that aggregates securely.

    Args:
        config: The federation.
        secure: Its ``secure`` section.
        whole: What the round hands out.
        store: Journals who dropped out.
        trust: Keys.
        grid: Flower's connection to the nodes.
    """

    def __init__(
        self,
        config: FederationConfig,
        secure: SecureConfig,
        whole: Start,
        store: Store,
        trust: Trust,
        grid: Grid,
    ) -> None:
        self._config, self._secure, self._whole = config, secure, whole
        self._store, self._trust, self._grid = store, trust, grid
        self._round = whole.plan.round
        self._nodes: dict[int, str] = {}
        self._groups: list[Group] = []
        self._of: dict[str, Group] = {}
        self._bytes_up = self._bytes_down = self._refused = 0
        self._metrics: dict[str, dict[str, float]] = {}

    @property
    def starts(self) -> dict[str, Start]:
        """What each client that is still in it is handed."""
        return {name: group.start for name, group in self._live().items()}

    def begin(self, asked: Mapping[int, str]) -> dict[int, str]:
        """Phases 1 and 2: groups, keys and shares.

        Args:
            asked: Clients by node.

        Returns:
            Those of them that are to train.
        """
        self._nodes = dict(asked)
        seed = f"{self._config.seed}/{self._config.run}/{self._round}"
        for number, names in enumerate(grouped(list(asked.values()), self._secure.group, seed)):
            self._form(number, names)
        self._phase("advertise", lambda group, name: b"", Recovery.take_advertisement)
        self._each(Recovery.roster)
        self._phase("deal", lambda group, name: group.recovery.roster().blob, Recovery.take_dealing)
        self._each(Recovery.close_dealing)
        live = self._live()
        return {node: name for node, name in asked.items() if name in live}

    def deliver(self, order: Message) -> Message:
        """An order to train, with what the client was dealt."""
        node = order.metadata.dst_node_id
        name = self._nodes[node]
        said = self._of[name].recovery.delivery(name)
        self._bytes_down += len(said)
        content = RecordDict({**order.content, SECURE_KEY: _record(said)})
        meta = order.metadata
        return Message(content, node, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)

    def admit(self, reply: Reply, start: Start, client: str) -> None:
        """Phase 3: add a client's masked update to its group's sum.

        Raises:
            RefusedError: It does not count, and why.
        """
        group = self._of.get(client)
        if group is None or start.plan.round != self._round:
            raise RefusedError("late", "its group's sum was opened without it, or is lost")
        try:
            blob = self._read(reply, client, group.session, "mask", UPDATE_KEY)
            group.recovery.take_masked(client, blob)
            self._bytes_up += len(blob)
        except (RefusedError, WireError) as error:
            group.dropped[client] = "mask"
            raise RefusedError(error.code, str(error)) from error
        assert reply.message is not None
        self._metrics[client] = claims(reply.message.content.get(METRICS_KEY), TRAIN_METRICS)

    def finish(self) -> Sums:
        """Phases 4 and 5; the mean of each group whose sum can be opened goes to the store."""
        self._each(Recovery.survivors)
        self._phase(
            "confirm", lambda group, name: group.recovery.survivors(), Recovery.take_confirmation
        )
        self._each(Recovery.confirmations)
        self._phase(
            "open", lambda group, name: group.recovery.confirmations(), Recovery.take_opening
        )
        for group in self._groups:
            summed: tuple[str, ...] = ()
            if not group.lost:
                try:
                    summed = contribute(group, self._metrics, self._store, self._trust.key)
                except (WireError, FullError) as error:
                    group.lost = _why(error)
            self._store.note("secure", group.facts(summed))
        return Sums(self.summed(), self._bytes_up, self._bytes_down, self._refused)

    def leave(self, reason: str) -> Sums:
        """The round comes to nothing: nobody is asked to open a sum, and none is kept.

        Args:
            reason: Why.
        """
        for group in self._groups:
            group.lost = group.lost or one_line(reason)
            self._store.note("secure", group.facts(()))
        return Sums(self.summed(), self._bytes_up, self._bytes_down, self._refused)

    def summed(self) -> int:
        """Clients whose updates are in sums that were opened, before an interruption too."""
        rows = [row for row in self._store.notes("secure") if row["round"] == self._round]
        return sum(len(row["summed"]) for row in rows)

    def _form(self, number: int, names: tuple[str, ...]) -> None:
        """Make a group of these clients; too few to hide anybody are refused."""
        try:
            group = form(number, names, self._secure, self._whole, self._trust.ring())
        except ValueError as error:
            for name in names:
                self._refuse(name, "threshold", str(error))
            return
        self._groups.append(group)
        self._of |= dict.fromkeys(names, group)

    def _live(self) -> dict[str, Group]:
        """Clients that have not dropped out, of groups that are not lost."""
        return {
            name: group
            for name, group in self._of.items()
            if not group.lost and name not in group.dropped
        }

    def _each(self, close: Callable[[Recovery], object]) -> None:
        """End a phase in every group; one with too few left is lost."""
        for group in self._groups:
            if not group.lost:
                try:
                    close(group.recovery)
                except WireError as error:
                    group.lost = _why(error)

    def _phase(
        self,
        phase: Phase,
        say: Callable[[Group, str], bytes],
        take: Callable[[Recovery, str, bytes], None],
    ) -> None:
        """Hand on to every client that is left what the others said, and take its answer."""
        live, orders = self._live(), []
        for node, name in self._nodes.items():
            if name in live:
                said = say(live[name], name)
                self._bytes_down += len(said)
                plan = live[name].start.content(None)[PLAN_KEY]
                content = RecordDict({PLAN_KEY: plan, SECURE_KEY: _record(said)})
                orders.append(
                    Message(
                        content,
                        node,
                        f"{MessageType.TRAIN}.{phase}",
                        ttl=self._secure.phase_s + 60,
                        group_id=str(self._round),
                    )
                )
        incoming: Iterable[Reply] = replies(
            self._grid, orders, deadline_s=self._secure.phase_s, poll_s=self._config.poll_s
        )
        for reply in incoming:
            name = self._nodes[reply.node]
            group = live[name]
            try:
                blob = self._read(reply, name, group.session, phase, SECURE_KEY)
                self._bytes_up += len(blob)
                take(group.recovery, name, blob)
            except (RefusedError, WireError) as error:
                group.dropped[name] = phase
                self._refuse(name, error.code, f"{phase}: {error}")

    def _read(
        self, reply: Reply, client: str, session: SecureSession, phase: Phase, key: str
    ) -> bytes:
        """What a reply says, opened if it was sealed.

        Raises:
            RefusedError: There is no such reply.
            WireError: It is too large, or not sealed to this round's key.
        """
        if reply.message is None:
            raise RefusedError(reply.code, reply.reason)
        record, named = (reply.message.content.get(name) for name in (key, CLIENT_KEY))
        if not isinstance(record, ArrayRecord) or list(record) != [key]:
            raise RefusedError("no-update", "the reply says nothing of this phase")
        if not isinstance(named, ConfigRecord) or named.get(CLIENT_KEY) != client:
            raise RefusedError("wrong-client", f"the reply does not call itself {client!r}")
        array, seal = record[key], self._trust.seal(self._round)
        asked = SEALED_STYPE if seal else SECURE_STYPE
        if array.stype != asked:
            raise RefusedError(
                "wrong-format", f"it came as {array.stype[:60]!r}, asked for {asked!r}"
            )
        return seal.open(array.data, most_bytes(session, phase)) if seal else bytes(array.data)

    def _refuse(self, client: str, code: str, reason: str) -> None:
        self._refused += 1
        refusal = Refusal(round=self._round, client=client, code=code, reason=one_line(reason))
        self._store.refuse(refusal)


def _record(said: bytes) -> ArrayRecord:
    return ArrayRecord({SECURE_KEY: Array("uint8", (len(said),), SECURE_STYPE, said)})


def _why(error: WireError | FullError) -> str:
    """Why a group is lost, on one line."""
    return one_line(f"{error.code if isinstance(error, WireError) else 'no-room'}: {error}")

"""Taking part in a federation without a SuperNode: wait for orders, do them, upload, go on.

Every decision is made of what the coordinator says now, so that it may be cut off anywhere: an
order that stands is asked for again, and what is on this node's disk for it is uploaded, from the
byte at which the last try ended. Loads no torch until something is trained.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from anabranch.client.api.caller import CallError
from anabranch.client.api.line import Line, Waiting, passes
from anabranch.client.api.transfer import download, upload
from anabranch.client.lone import Answer, LoneNode, NodeRefusedError, Order
from anabranch.wire.plan import RoundPlan
from anabranch.wire.v1 import coordinator_pb2 as pb

METRICS = 16
"""Most claims that an upload may carry."""

LASTING = frozenset({"unsigned", "unknown-key", "wrong-key", "bad-signature", "revoked-key"})
"""Codes of refused updates that the next round would bring again: their reason is a key."""
CALLER = frozenset(
    {"revoked", "expired", "unknown-certificate", "no-certificate", "role", "federation", "method",
     "secure"}
)  # fmt: skip
"""Codes of refusals that are about who calls, and not about what was sent."""

Tell = Callable[[str, str, dict[str, Any]], None]
"""Told what happens: its kind, in words, and facts."""


class StoppedError(BaseException):
    """Whoever runs this told it to stop. No ``except Exception`` of a task's may swallow it."""


class Ended(StrEnum):
    """Why it takes part no longer."""

    OVER = "over"
    """The federation begins no further round."""
    ONCE = "once"
    """It was to look once."""
    REFUSED = "refused"
    """It was to look once, and the update was refused."""


@dataclass(frozen=True)
class Manner:
    """How to take part.

    Attributes:
        every_s: Seconds between two looks for an order.
        most_s: Most seconds between two tries while the coordinator is away.
        once: Look once: do what is asked now, if anything is.
    """

    every_s: float = 5.0
    most_s: float = 60.0
    once: bool = False


def file_prefix(federation: str) -> str:
    """What names of a federation's files begin with, in a state folder that several may share."""
    return hashlib.sha256(federation.encode()).hexdigest()[:16]


class TakingPart:
    """A site's part in one federation.

    Args:
        line: To the coordinator.
        federation: Its name.
        client: The site's name.
        node: Does the orders.
        folder: Where starts are downloaded to.
        tell: Told what happens; of what it waits for once, until that is something else.
        manner: How.
        stop: Set once it is to stop.
    """

    def __init__(
        self,
        line: Line,
        federation: str,
        client: str,
        node: LoneNode,
        folder: Path,
        tell: Tell,
        manner: Manner,
        stop: threading.Event,
    ) -> None:
        self._line, self._federation, self._client, self._node = line, federation, client, node
        self._folder, self._tell, self._manner, self._stop = folder, tell, manner, stop
        self._prefix = file_prefix(federation)
        self._waiting = Waiting(manner.every_s, manner.most_s, client)
        self._waits_for = ""
        self._joined = self._away = False
        self._refused = ""  # the text of a plan whose update was refused: it is not tried again
        self._uploads = ""  # the text of the plan whose update is on its way
        self._made: tuple[str, Answer] | None = None  # by its plan's text: it may be sealed

    def run(self) -> Ended:
        """Take part until the federation is over.

        Raises:
            CallError: The coordinator refused this site; or, looking once, was not reached.
            NodeRefusedError: The node does not do an order that stands, or failed at it.
            ValueError: The federation is signed, and the node has no keys.
            StoppedError: It was told to stop.
        """
        while True:
            self._check_stop()
            try:
                ended = self._look()
            except CallError as error:
                if not passes(error) or self._manner.once:
                    raise
                self._lost(error)
                self._pause(failed=True)
                continue
            if ended is not None:
                return ended

    def _look(self) -> Ended | None:
        """One look: what is asked, or whether anything more will be."""
        if not self._joined:
            self._call("Uploads.Join", pb.JoinRequest(federation=self._federation))
            self._joined = True
            self._say("joined", f"takes part in {self._federation} as {self._client}")
        self._renew()
        order, admitted = self._order()
        if order is not None and order.text != self._refused:
            done = self._do(order)
            return done if self._manner.once else None
        status = self._call("Federations.Status", pb.StatusRequest(federation=self._federation))
        if status.over:
            why = f" ({status.last})" if status.done < status.rounds else ""
            told = f"{self._federation} is over: {status.done} of {status.rounds} rounds{why}"
            self._say("over", told, done=status.done, rounds=status.rounds)
            return Ended.OVER
        self._wait_for(*_what(status, admitted, refused=order is not None))
        if self._manner.once:
            return Ended.ONCE
        self._pause(failed=False)
        return None

    def _do(self, order: Order) -> Ended | None:
        """Train for an order and upload; returns what came of it, None where it stands no more."""
        about = {"round": order.plan.round}
        if order.signature and not self._node.signs:
            raise ValueError(
                f"{self._federation} is signed, and takes no update without a signature: give "
                "--keys, a folder with coordinator.pub and the key that was enrolled as "
                f"{self._client}.key"
            )
        try:
            answer = self._answer(order)
        except NodeRefusedError:
            now, _ = self._order()
            if now is not None and now.text == order.text:
                raise
            # The round ended meanwhile: the start that came belongs to another one.
            self._say("outdated", f"round {order.plan.round} ended before it was done", **about)
            return None
        size = len(answer.blob)
        if self._uploads != order.text:  # told once, however often it is cut off
            self._uploads = order.text
            self._say("uploading", f"round {order.plan.round}: uploads {size} bytes", **about)
        metrics = dict(list(answer.metrics.items())[:METRICS])
        try:
            digest = upload(
                self._line.caller(), self._federation, order.plan.round, answer.blob, metrics
            )
        except CallError as error:
            if passes(error) or error.code in LASTING | CALLER:
                raise
            self._refused = order.text
            told = f"round {order.plan.round}: the update is refused: {error}"
            self._say("refused", told, code=error.code, **about)
            # Whoever has a node as well has answered by it.
            return Ended.ONCE if error.code == "duplicate" else Ended.REFUSED
        self._back()
        told = f"round {order.plan.round}: admitted as {digest[:16]}"
        self._say("admitted", told, artifact=digest, bytes=size, **about)
        self._made = None
        return Ended.ONCE

    def _answer(self, order: Order) -> Answer:
        """The update for an order: made now, or before."""
        if self._made is not None and self._made[0] == order.text:
            return self._made[1]
        about = {"round": order.plan.round}
        start = None
        if not self._node.holds(order):
            start = self._start(order)
            self._wait_for("training", f"round {order.plan.round}: trains", about)
        answer = self._node.answer(order, start)
        if answer.again:
            told = f"round {order.plan.round}: the update was on disk, nothing is trained again"
        else:
            seconds = answer.metrics.get("train-seconds", 0.0)
            told = f"round {order.plan.round}: trained in {seconds:.1f} s"
        facts = {"bytes": len(answer.blob), "again": answer.again, "metrics": answer.metrics}
        self._say("made", told, **about, **facts)
        self._made = order.text, answer
        return answer

    def _start(self, order: Order) -> bytes | None:
        """What an order starts from, as it is sent; None where the plan's seed describes it."""
        if not order.start_bytes:
            return None
        path = self._folder / f"{self._prefix}.{order.plan.start_hash[:32]}.start"
        told = f"round {order.plan.round}: downloads the adapter"
        self._wait_for("downloading", told, {"round": order.plan.round})
        path.unlink(missing_ok=True)
        try:
            download(self._line.caller(), self._federation, "start", path)
        except CallError as error:
            if error.code == "wrong-offset":  # what is here is of another start
                path.with_name(f"{path.name}.partial").unlink()
            raise
        self._back()
        data = path.read_bytes()
        # Of starts only what was cut off stays, until the next one has come.
        for old in self._folder.glob(f"{self._prefix}.*.start*"):
            old.unlink()
        return data

    def _order(self) -> tuple[Order | None, bool]:
        """What the round under way asks, and whether this site's update of it is in."""
        reply = self._call("Uploads.Order", pb.OrderRequest(federation=self._federation))
        if not reply.plan:
            return None, reply.admitted
        try:
            plan = RoundPlan.model_validate_json(reply.plan)
        except ValidationError as error:
            raise NodeRefusedError(
                f"the order cannot be read ({error.errors()[0]['msg']}); is this Anabranch as new "
                "as the coordinator's?"
            ) from error
        signed = reply.plan_key_id, reply.plan_signature
        return Order(reply.plan, plan, *signed, reply.start_bytes), False

    def _call(self, name: str, request: Any) -> Any:
        reply = self._line.caller().call(name, request)
        self._back()
        return reply

    def _renew(self) -> None:
        try:
            if self._line.renew():
                self._say("renewed", "has a new certificate")
        except CallError as error:
            self._say("not-renewed", f"the certificate ends soon and is not renewed: {error}")

    def _lost(self, error: CallError) -> None:
        self._line.drop()
        # Of one absence the reasons differ with each try.
        key = error.code if error.refused else "away"
        self._away = self._away or not error.refused
        event, whom = ("held-up", "") if error.refused else ("away", "for the coordinator ")
        told = f"waits {whom}and tries again: {error}"
        self._wait_for(event, told, {"code": error.code}, key=key)

    def _back(self) -> None:
        if self._away:
            self._away, self._waits_for = False, ""
            self._say("back", "the coordinator answers again")

    def _wait_for(self, event: str, told: str, facts: dict[str, Any], key: str = "") -> None:
        """Tell what it waits for, once."""
        if (key or told) != self._waits_for:
            self._waits_for = key or told
            self._tell(event, told, facts)

    def _say(self, event: str, told: str, **facts: Any) -> None:
        self._waits_for = ""
        self._tell(event, told, facts)

    def _pause(self, failed: bool) -> None:
        self._stop.wait(self._waiting.next_s(failed))
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StoppedError


def _what(status: Any, admitted: bool, refused: bool) -> tuple[str, str, dict[str, Any]]:
    """What there is to wait for while nothing is asked: its kind, in words, and facts."""
    facts = {"round": status.round or status.done + 1, "done": status.done, "want": status.want}
    if status.want == "pause":
        told = "the operator, who has paused the federation"
    elif not status.round:
        told = f"round {status.done + 1} of {status.rounds}"
    elif admitted:
        told = f"round {status.round} to end; it has this site's update"
    elif refused:
        told = f"the next round; round {status.round} takes nothing more of this site"
    else:
        told = f"the next round; round {status.round} asks for nothing of this site"
    return "waiting", f"waits for {told}", facts

"""How often a peer may call, and how much it may have open at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from grpc import StatusCode

from anabranch.coordinator.api.refusal import RefusedCallError

KNOWN = 20_000
"""Peers remembered; who was not seen for longest is forgotten first, with a full allowance."""
TOLD_EVERY_S = 60.0
"""Seconds between two audit entries about one peer that calls too often."""


@dataclass
class _Allowance:
    left: float
    at_s: float
    told_s: float = float("-inf")


class Quotas:
    """Allowances of calls, which fill up again with time.

    Args:
        per_s: Calls a second that a peer may make for long.
        burst: Calls that it may make at once.
        clock: Monotonic seconds.
    """

    def __init__(
        self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._peers: OrderedDict[str, _Allowance] = OrderedDict()
        self._open: set[tuple[str, str]] = set()

    def take(self, peer: str) -> None:
        """Count one call.

        Raises:
            OverQuotaError: None is left. It is told once a minute only, so that who floods the
                coordinator does not fill its disk.
        """
        now = self._clock()
        one = self._peers.pop(peer, None) or _Allowance(self._burst, now)
        one.left = min(self._burst, one.left + (now - one.at_s) * self._per_s)
        one.at_s = now
        self._peers[peer] = one
        if len(self._peers) > KNOWN:
            self._peers.popitem(last=False)
        if one.left >= 1:
            one.left -= 1
            return
        tell = now - one.told_s >= TOLD_EVERY_S
        if tell:
            one.told_s = now
        raise OverQuotaError(tell, self._per_s)

    @contextmanager
    def only_one(self, peer: str, what: str) -> Iterator[None]:
        """Hold a peer to one of something at a time.

        Raises:
            RefusedCallError: ``busy``: it has one open.
        """
        key = (peer, what)
        if key in self._open:
            raise RefusedCallError(
                "busy", f"another {what} of yours is open; end it first", StatusCode.ABORTED
            )
        self._open.add(key)
        try:
            yield
        finally:
            self._open.discard(key)


class OverQuotaError(RefusedCallError):
    """A peer calls too often.

    Attributes:
        told: Whether that goes into the audit log.
    """

    def __init__(self, told: bool, per_s: float) -> None:
        super().__init__(
            "quota",
            f"more than {per_s:g} calls a second; wait and call again",
            StatusCode.RESOURCE_EXHAUSTED,
        )
        self.told = told

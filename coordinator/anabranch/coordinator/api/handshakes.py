"""TLS handshakes that came to nothing: no certificate, one of another authority, an expired one.

gRPC's library refuses those before any of our code runs, and says nothing. But it asks for the
server's certificate at each handshake, and every honest connection goes on to a call: handshakes
that no call followed are those that were refused, or left hanging.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

KNOWN = 50_000
"""Connections remembered."""


class Handshakes:
    """Counts handshakes against first calls.

    Args:
        patience_s: Seconds a connection may take to its first call.
        clock: Monotonic seconds.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._begun: deque[float] = deque(maxlen=KNOWN)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """A handshake begins; called in threads of gRPC's."""
        with self._lock:
            self._begun.append(self._clock())

    def call(self, peer: str) -> None:
        """A call came over a connection."""
        with self._lock:
            if peer not in self._seen:
                self._seen[peer] = None
                if len(self._seen) > KNOWN:
                    self._seen.popitem(last=False)
                if self._begun:
                    self._begun.popleft()

    def lost(self) -> int:
        """How many came to nothing since this was asked last."""
        with self._lock:
            count, now = 0, self._clock()
            while self._begun and now - self._begun[0] >= self._patience_s:
                self._begun.popleft()
                count += 1
            return count

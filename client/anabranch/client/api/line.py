"""A connection that is made anew when it broke, or when the certificate has become another.

Loads no torch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cryptography import x509

from anabranch.client.api.caller import Caller, CallError
from anabranch.client.api.credentials import CERTIFICATE_FILE, Credentials
from anabranch.client.api.enrolling import rotate

RENEW_SHARE = 1 / 3
"""A certificate is renewed once so much of its life is left."""
RENEW_EVERY_S = 3600.0
"""Seconds between two tries to renew one."""

PASSING = frozenset(
    {"quota", "busy", "stalled", "cut-off", "wrong-offset", "bad-digest", "no-room", "no-store",
     "not-served", "internal"}
)  # fmt: skip
"""Codes of refusals that say nothing of the caller: the same call may succeed later."""


def passes(error: CallError) -> bool:
    """Whether a call that failed is worth another try."""
    return not error.refused or error.code in PASSING


class Line:
    """A peer's connection to its coordinator.

    Args:
        credentials: What the peer shows; renewed in time.
        address: ``HOST:PORT``.
        clock: Unix seconds.
    """

    def __init__(
        self, credentials: Credentials, address: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._credentials, self._address, self._clock = credentials, address, clock
        self._caller: Caller | None = None
        self._stamp = 0
        self._tried_s = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.drop()

    def caller(self) -> Caller:
        """The connection.

        Raises:
            CallError: ``expired``: the certificate has ended.
            ValueError: The folder holds no certificate.
        """
        stamp = (self._credentials.folder / CERTIFICATE_FILE).stat().st_mtime_ns
        if self._caller is None or stamp != self._stamp:
            self.drop()
            # The handshake alone would say no, and not why.
            if self._left()[0] <= 0:
                raise CallError(
                    "expired",
                    f"{self._credentials.folder}: the certificate has ended; enrol again with a "
                    "new invitation",
                    refused=True,
                )
            self._caller, self._stamp = Caller(self._address, self._credentials), stamp
        return self._caller

    def renew(self) -> bool:
        """Get another certificate where this one ends soon; returns whether it did.

        Raises:
            CallError: It was refused, or the coordinator was not reached: the old one stays.
        """
        left_s, life_s = self._left()
        if left_s > RENEW_SHARE * life_s or self._clock() - self._tried_s < RENEW_EVERY_S:
            return False
        self._tried_s = self._clock()
        rotate(self._credentials, self._address)
        return True

    def drop(self) -> None:
        """Close the connection; the next call makes another one at once."""
        if self._caller is not None:
            self._caller.__exit__(None, None, None)
            self._caller = None

    def _left(self) -> tuple[float, float]:
        """Seconds that the certificate holds still, and those that it held from its beginning."""
        path = self._credentials.folder / CERTIFICATE_FILE
        try:
            held = x509.load_pem_x509_certificate(path.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"{path}: missing or damaged; `anabranch client enrol` writes it"
            ) from error
        end_s = held.not_valid_after_utc.timestamp()
        return end_s - self._clock(), end_s - held.not_valid_before_utc.timestamp()


class Waiting:
    """How long to wait for the next try: the same while all is well, longer while it is not.

    Args:
        every_s: Seconds between two looks.
        most_s: Most seconds between two tries of what fails.
        name: The caller's: each has a spread of its own, so that all do not come at once.
    """

    def __init__(self, every_s: float, most_s: float, name: str) -> None:
        self._every_s, self._most_s = every_s, max(every_s, most_s)
        self._spread = random.Random(name)
        self._failed = 0

    def next_s(self, failed: bool) -> float:
        """Seconds to wait, after a look that failed or did not."""
        self._failed = self._failed + 1 if failed else 0
        wait_s = min(self._most_s, self._every_s * 2.0 ** min(self._failed - 1, 30))
        return (wait_s if failed else self._every_s) * self._spread.uniform(0.75, 1.25)

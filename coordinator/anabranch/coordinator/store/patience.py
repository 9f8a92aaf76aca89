"""Waits for a database that is gone, hangs or is locked, says so, and does the work over.

A database that is killed is started again, a cut line comes back: neither is a run's end. What was
sent when it went may have been committed or not, so work that is done over is told to look first.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError

from anabranch.coordinator.store.base import LostError
from anabranch.wire.errors import one_line

log = logging.getLogger("anabranch.coordinator")

ANSWER_S = 30.0
"""Seconds after which a server that says nothing is taken for gone, and its connections are cut."""
SAY_S = 10.0
"""Seconds between two words in the log while it is waited for."""
FIRST_S, LONGEST_S = 0.1, 2.0
"""Seconds between two tries: they double, up to the second."""
GONE_STATES = ("08", "57P", "53300", "40001", "40P01")
"""How PostgreSQL's states begin that another try may get rid of: no connection, a server that stops
or starts, too many connections, another transaction's fault."""

T = TypeVar("T")


class Patience:
    """Does work on one database, over again if need be.

    Args:
        engine: The database.
        place: Where it is, for people.
        patience_s: Seconds for which it is waited for.
    """

    def __init__(self, engine: Engine, place: str, patience_s: float) -> None:
        self._place, self._patience_s = place, patience_s
        self._served = engine.dialect.name != "sqlite"
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        if self._served:
            # Those that were opened before are not known here, and could not be cut.
            engine.dispose()
            event.listen(engine, "connect", lambda connection, _: self._open.add(connection))

    def __call__(self, work: Callable[[bool], T]) -> T:
        """What the work returns.

        Args:
            work: Called with whether it was tried before: it may have been done by then.

        Raises:
            LostError: The database was waited for, and did not come back.
        """
        again, wait_s, said_s = False, FIRST_S, -SAY_S
        began_s = time.monotonic()
        while True:
            try:
                with self._heard():
                    found = work(again)
            except DBAPIError as error:
                if not is_gone(error):
                    raise
                waited_s, why = time.monotonic() - began_s, one_line(str(error.orig))
                if waited_s >= self._patience_s:
                    raise LostError(
                        f"{self._place} does not answer since {waited_s:.0f} s ({why}); start it "
                        "and run again: what was admitted is kept"
                    ) from error
                if waited_s - said_s >= SAY_S:
                    left_s = self._patience_s - waited_s
                    log.warning(
                        "%s does not answer, waiting %.0f s more: %s", self._place, left_s, why
                    )
                    said_s = waited_s
            else:
                if again:
                    log.warning("%s answers again", self._place)
                return found
            again = True
            time.sleep(wait_s)
            wait_s = min(LONGEST_S, 2 * wait_s)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Cut the connections if nothing is heard for too long: no driver would ever."""
        if not self._served:
            yield
            return
        timer = threading.Timer(ANSWER_S, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self) -> None:
        log.warning("%s said nothing for %.0f s; its connections are cut", self._place, ANSWER_S)
        for connection in list(self._open):
            if not connection.closed:
                with socket.socket(fileno=os.dup(connection.fileno())) as copy:
                    copy.shutdown(socket.SHUT_RDWR)


def is_gone(error: DBAPIError) -> bool:
    """Whether another try may do without this error."""
    original: Any = error.orig
    if error.connection_invalidated:
        return True
    name = getattr(original, "sqlite_errorname", None)
    if name is not None:
        return str(name).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    state = getattr(original, "sqlstate", None)
    if state is None:
        # It never came as far as the server.
        return any(kind.__name__ == "OperationalError" for kind in type(original).__mro__)
    return str(state).startswith(GONE_STATES)

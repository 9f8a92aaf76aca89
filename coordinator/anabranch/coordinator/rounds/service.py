"""Whether a federation is to be at work, and on which port: what was started stays so.

By way of its store, as what an operator asks: whoever supervises reads it, after its own death too.
Loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from anabranch.coordinator.store import Store

EVENT = "service"
"""The kind of note that holds it."""


@dataclass(frozen=True)
class Service:
    """What was said last.

    Attributes:
        started: Whether it is to be at work.
        port: That of its SuperLink; the next start takes it again where it can.
        task: Name of what nodes train, among the tasks of the coordinator's machine.
        by: Who said so.
        why: Why it is not to be any more; empty while it is.
    """

    started: bool
    port: int
    task: str
    by: str
    why: str = ""


def service(store: Store) -> Service | None:
    """What was said last; None where it was never started."""
    row = store.last_note(EVENT)
    return None if row is None else Service(**row)


def start(store: Store, port: int, task: str, by: str) -> Service:
    """Let it be at work from now on."""
    return _note(store, Service(True, port, task, by))


def end(store: Store, now: Service, why: str) -> Service:
    """Let it rest, until it is started again."""
    return _note(store, Service(False, now.port, now.task, "coordinator", why))


def _note(store: Store, now: Service) -> Service:
    store.note(EVENT, asdict(now))
    return now
